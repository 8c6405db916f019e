"""compare: two profiles of the same candidates, e.g. of two checkpoints: which hit rates moved, and what that does to the pivots.

Says when labels have drifted and pivots are due for another profile, and which labels of another model must not be reused (R7).

Curtailed samples stop for what they have seen, so k/n of them is no plain average. Where the ending is one of the header's plan,
rates are estimated without that bias (`endings.unbiased_rate`), and the test of two rates counts the ways to both endings
(`endings.same_rate_p_value`); with all K of everything these are k/K and Fisher's exact test. Two passes over lines; of each
candidate a few numbers stay in memory.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from nemo_pivotrl.algorithms import early_stopping_estimates as endings, selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.core.artifacts import Header, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Profile
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, plan_in
from nemo_pivotrl.pivotrl.select import KEYS, by_number, by_size

CONFIDENCE = 0.95
FALSE_DISCOVERY_RATE = 0.05
MOVERS = 10
CLASSES = ("all 0", "0 so far", "kept", "too easy", "1 so far", "all 1", "all equal", "failed")
"""`so far`: curtailed before all K, so that whether the rest would have been equal too is not known, nor needed for selection."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one profile says of one candidate. Candidates with the same outcomes share one."""

    hit_class: str
    rate: float
    """Hit rate, estimated without the bias of stopping where that is known. NaN for what failed."""
    mean: float
    """Mean reward of the samples there are."""
    successes: int
    count: int
    plan: StoppingRule | None
    """What its sampling stopped by; None where that is unknown (rescored samples) or rewards are not 0 or 1."""
    end: tuple[int, int]
    """(successes, failures) at which that plan ended."""
    kept: bool
    """Whether the profile's rule keeps it."""
    decided: bool
    """Whether its samples decide that for any outcome of the rest."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two profiles."""

    path: Path
    header: Header
    plan: StoppingRule
    lambda_diff: float


class Pair(NamedTuple):
    """A candidate that both profiles have."""

    candidate_id: str
    split: str
    groups: tuple[str, ...]
    """One for each of `select.KEYS`."""
    left: Measured
    right: Measured


def compare(left: Path, right: Path, lambda_diff: float | None = None) -> dict[str, Any]:
    """What changed from one profile to the other, as JSON has it; `as_text` shows it.

    Each profile's own rule and lambda_diff select its pivots, unless `lambda_diff` is given for both. Raises InputError for files
    that are no profiles, have no candidate in common or one twice, or decide an interval of lambdas of which none is named.
    """
    sides = side_of(left, lambda_diff), side_of(right, lambda_diff)
    pairs, only_left, only_right = _join(*sides)
    if not pairs:
        remedy = "give two profiles of the same candidates file"
        raise InputError(Problem(str(right), None, "candidate_id", f"none of those in {left}", remedy))
    both = [p for p in pairs if p.left.count and p.right.count]
    values, threshold = _test(both)
    moved = [_moved(p, value, threshold) for p, value in zip(both, values, strict=True)]
    train = [p for p in pairs if p.split == "train"]
    tested = sum(not math.isnan(value) for value in values)
    return {
        "left": _told(sides[0]),
        "right": _told(sides[1]),
        "other_reasons": other_reasons(sides[0].header, sides[1].header),
        "notes": _notes(*sides),
        "candidates": {"both": len(pairs), "only_left": only_left, "only_right": only_right, "compared": len(both)},
        "hit_rate": _change([(p.left.rate, p.right.rate) for p in both]),
        "classes": _transitions(pairs),
        "undecided": {"left": sum(not p.left.decided for p in train), "right": sum(not p.right.decided for p in train)},
        "pivots": _pivots(train),
        "moved": {
            "tested": tested,
            "not_testable": len(both) - tested,
            "false_discovery_rate": FALSE_DISCOVERY_RATE,
            "threshold": threshold,
            "smallest_p": min((v for v in values if not math.isnan(v)), default=None),
            "up": moved.count(1),
            "down": moved.count(-1),
        },
        "by": {name: _by(both, moved, i, name) for i, name in enumerate(KEYS)},
        "largest": _largest(both, values, threshold),
    }


def side_of(path: Path, lambda_diff: float | None) -> Side:
    """A profile and the lambda_diff that selects its pivots."""
    header = read_header(path, "profiles")
    plan = plan_in(header)
    if lambda_diff is None and plan.lambda_low != plan.lambda_high:
        found = f"decides every lambda_diff from {plan.lambda_low:g} to {plan.lambda_high:g}"
        raise InputError(Problem(str(path), 1, "plan", found, "say which one selects: --lambda 0.6"))
    return Side(path, header, plan, plan.lambda_high if lambda_diff is None else lambda_diff)


def _told(side: Side) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "policy": side.header.policy,
        "num_generations": side.plan.count,
        "curtailed": side.plan.curtailed,
        "rule": side.plan.rule,
        "lambda_diff": side.lambda_diff,
    }


def other_reasons(left: Header, right: Header) -> list[str]:
    """What besides the policy may have moved hit rates: each is a reason not to call the difference drift."""
    compared = {
        "verifier": (left.verifier, right.verifier),
        "tokenizer": (left.tokenizer, right.tokenizer),
        "chat_template": (left.chat_template, right.chat_template),
        "sampling": (left.extra.get("sampling"), right.extra.get("sampling")),
    }
    found = [f"{name}: {ours} | {theirs}" for name, (ours, theirs) in compared.items() if ours != theirs]
    if left.policy == right.policy:
        found.append(f"policy: both are of revision {left.policy}; what differs is no drift of the policy")
    return found


def _notes(left: Side, right: Side) -> list[str]:
    notes = []
    if left.header.parent != right.header.parent:
        notes.append("the two were made from different candidates files; candidates are joined by their ids")
    if left.header.config_hash != right.header.config_hash:
        notes.append("seed, num_generations, limit, context length or number type differ (config_hash)")
    notes += [
        f"{side.path} is rescored: its curtailed samples stopped by another verifier's verdicts, so their rates are plain k/n "
        "and they are not tested"
        for side in (left, right)
        if "rescored_from" in side.header.extra and side.plan.curtailed
    ]
    return notes


# ---- one candidate ----


def measure(profile: Profile, side: Side) -> Measured:
    """What a profile says of a candidate."""
    if profile.failure is not None:
        return FAILED
    full = profile.control or not side.plan.curtailed
    rescored = "rescored_from" in side.header.extra
    return _measure(profile.rewards, side.plan, side.lambda_diff, full, rescored)


FAILED = Measured("failed", math.nan, math.nan, 0, 0, None, (0, 0), False, True)


@lru_cache(maxsize=65536)
def _measure(
    rewards: tuple[float, ...], plan: StoppingRule, lambda_diff: float, full: bool, rescored: bool
) -> Measured:
    stats = selection.statistics(rewards)
    rule: selection.Rule = "adv" if plan.rule == "random" else plan.rule
    kept = selection.keep_pivot(stats, rule, lambda_diff, plan.inclusive)
    stopped, end = None, (0, 0)
    if stats.binary:
        drawn_by = dataclasses.replace(plan, curtailed=False) if full else plan
        found = None if rescored and not full else _end(rewards, drawn_by)
        stopped, end = (drawn_by, found) if found else (None, end)
    return Measured(
        _class_of(stats, plan, kept),
        float(endings.unbiased_rate(stopped, end)) if stopped else stats.mean,
        stats.mean,
        stats.successes,
        stats.count,
        stopped,
        end,
        kept,
        plan.decided_at(lambda_diff, rule, plan.inclusive, rewards),
    )


def _end(rewards: Sequence[float], plan: StoppingRule) -> tuple[int, int] | None:
    """Where the plan ends these outcomes; they may go on, where an earlier plan drew more. None where it would draw more of them."""
    seen = 0
    while more := plan.ask(rewards[:seen]):
        if seen + more > len(rewards):
            return None
        seen += more
    successes = rewards[:seen].count(1.0)
    return successes, seen - successes


def _class_of(stats: selection.GroupStatistics, plan: StoppingRule, kept: bool) -> str:
    if stats.variance > 1e-12:
        return "kept" if kept else "too easy"
    if stats.mean not in (0.0, 1.0):
        return "all equal"
    return f"all {stats.mean:.0f}" if stats.count >= plan.count else f"{stats.mean:.0f} so far"


def _join(left: Side, right: Side) -> tuple[list[Pair], int, int]:
    """(what both have in the right one's order, how many are in the left one only, in the right one only)."""
    ours: dict[str, Measured] = {}
    for profile in _profiles(left):
        _once(ours, profile, left)
        ours[profile.candidate.candidate_id] = measure(profile, left)
    pairs, met, only_right = [], set[str](), 0
    for profile in _profiles(right):
        name = profile.candidate.candidate_id
        _once(met, profile, right)
        met.add(name)
        if name not in ours:
            only_right += 1
            continue
        groups = tuple(sys.intern(key(profile)) for key in KEYS.values())
        pairs.append(Pair(name, profile.candidate.split, groups, ours[name], measure(profile, right)))
    return pairs, len(ours) - len(pairs), only_right


def _profiles(side: Side) -> Iterable[Profile]:
    return (light_of_row(row) for row in read_rows(side.path))


def _once(known: Collection[str], profile: Profile, side: Side) -> None:
    name = profile.candidate.candidate_id
    if name in known:
        raise InputError(
            Problem(str(side.path), None, "candidate_id", f"{name} twice", "profile again; ids are unique")
        )


# ---- all of them ----


def _change(rates: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means and the mean change, paired by candidate, with a normal interval over candidates; None where there are too few."""
    n = len(rates)
    if not n:
        return {"left": None, "right": None, "change": None, "low": None, "high": None}
    left, right = (math.fsum(pair[i] for pair in rates) / n for i in (0, 1))
    change = right - left
    low = high = None
    if n > 1:
        spread = math.sqrt(math.fsum((b - a - change) ** 2 for a, b in rates) / (n - 1) / n)
        reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * spread
        low, high = change - reach, change + reach
    return {"left": left, "right": right, "change": change, "low": low, "high": high}


def _transitions(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """{class in the left one: {class in the right one: candidates}}, of the classes there are."""
    counts = Counter((p.left.hit_class, p.right.hit_class) for p in pairs)
    used = [[c for c in CLASSES if any(key[i] == c for key in counts)] for i in (0, 1)]
    return {a: {b: counts[a, b] for b in used[1]} for a in used[0]}


def _pivots(train: Sequence[Pair]) -> dict[str, Any]:
    """Sizes and overlap of what the rules keep of the common train candidates, and both rates of each set."""
    left, right = [p for p in train if p.left.kept], [p for p in train if p.right.kept]
    both = sum(p.right.kept for p in left)
    union = len(left) + len(right) - both
    return {
        "left": len(left),
        "right": len(right),
        "both": both,
        "jaccard": both / union if union else None,
        "rates_of_left": _rates(left),
        "rates_of_right": _rates(right),
    }


def _rates(pivots: Sequence[Pair]) -> dict[str, Any]:
    told = _change([(p.left.rate, p.right.rate) for p in pivots if p.left.count and p.right.count])
    return {"left": told["left"], "right": told["right"]}


def _test(pairs: Sequence[Pair]) -> tuple[list[float], float]:
    """(p-value of each pair, NaN where it cannot be tested; the greatest that is significant, 0 where none is)."""
    values = [
        endings.same_rate_p_value(p.left.plan, p.left.end, p.right.plan, p.right.end)
        if p.left.plan and p.right.plan
        else math.nan
        for p in pairs
    ]
    return values, significant_to([v for v in values if not math.isnan(v)], FALSE_DISCOVERY_RATE)


def significant_to(values: Sequence[float], rate: float) -> float:
    """The greatest p-value that Benjamini and Hochberg's procedure rejects at a false-discovery rate; 0 where it rejects none."""
    ordered = sorted(values)
    return max((v for i, v in enumerate(ordered, start=1) if v <= rate * i / len(ordered)), default=0.0)


def _moved(pair: Pair, value: float, threshold: float) -> int:
    """1: significantly up, -1: down, 0: neither."""
    if math.isnan(value) or value > threshold:
        return 0
    left, right = (Fraction(side.end[0], sum(side.end)) for side in (pair.left, pair.right))
    return (right > left) - (right < left)


def _by(pairs: Sequence[Pair], moved: Sequence[int], place: int, name: str) -> dict[str, dict[str, Any]]:
    """Candidates, mean change, and how many moved significantly, by one of the keys."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"candidates": 0, "change": 0.0, "up": 0, "down": 0})
    for pair, way in zip(pairs, moved, strict=True):
        row = sums[pair.groups[place]]
        row["candidates"] += 1
        row["change"] += pair.right.rate - pair.left.rate
        row["up"] += way == 1
        row["down"] += way == -1
    rows = by_number(sums) if name in ("depth", "prompt") else by_size(sums, "candidates")
    return {key: row | {"change": row["change"] / row["candidates"]} for key, row in rows.items()}


def _largest(pairs: Sequence[Pair], values: Sequence[float], threshold: float) -> list[dict[str, Any]]:
    """The movers of least p-value, the wider first among equals; those that cannot be tested come last."""

    def distance(pair: Pair) -> float:
        return abs(pair.right.mean - pair.left.mean)

    def order(i: int) -> tuple[float, float, str]:
        return math.inf if math.isnan(values[i]) else values[i], -distance(pairs[i]), pairs[i].candidate_id

    changed = (i for i, pair in enumerate(pairs) if distance(pair) > 0)
    return [
        {
            "candidate_id": pairs[i].candidate_id,
            **dict(zip(KEYS, pairs[i].groups, strict=True)),
            "left": _counted(pairs[i].left),
            "right": _counted(pairs[i].right),
            "p_value": None if math.isnan(values[i]) else values[i],
            "significant": _moved(pairs[i], values[i], threshold) != 0,
        }
        for i in heapq.nsmallest(MOVERS, changed, key=order)
    ]


def _counted(measured: Measured) -> dict[str, Any]:
    return {"successes": measured.successes, "count": measured.count, "mean": measured.mean}
