"""select: profiles -> pivots. Pure and quick; the pivot set's version is a digest of its members.

A first pass over the file keeps of each candidate what the rule and the tables need, a second one copies those chosen.

The rule applies to the train split. Held-out states pass through unfiltered: they are what training is validated on.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.components.conclusions import TALK, conclude, pivot_checks
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import load_recipe_verifier
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, placed_rows, read_header, rows_at, write_artefact
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Profile
from nemo_pivotrl.data.states import moved_reference, open_states
from nemo_pivotrl.pivotrl.constant_answers import Earned, best, earnings, won
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, plan_in

Counts = dict[str, Any]
SHOWN = 12
"""Rows of a table by task or action; the others are added up."""
SHORTEST = 64
DEPTHS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 10**9))


@one_writer
def select_pivots(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the pivot set and print how many candidates are pivots. Raises InputError if none is.

    >>> path = select_pivots(load_recipe("recipe.yaml", ["select.output=most.jsonl", "select.lambda_diff=0.9"]))
    >>> path.name
    'most.jsonl'
    """
    source, settings = recipe.path(recipe.select.profiles), recipe.select
    target = recipe.path(settings.output)
    found = read_header(source, "profiles")
    check_lineage(recipe, source, found)
    train: list[Profile] = []
    places, held_out = array("q"), array("q")
    for place, row in placed_rows(source):
        light = light_of_row(row)
        if light.candidate.split == "train":
            train.append(light)
            places.append(place)
        elif light.failure is None:
            held_out.append(place)
    check_decided(recipe, train, plan_in(found), source)
    pivots = selection.select(
        train,
        settings.rule,
        settings.lambda_diff,
        recipe.seed,
        settings.inclusive,
        settings.limit,
        settings.max_message_ratio,
    )
    by_id = {p.candidate.candidate_id: place for p, place in zip(train, places, strict=True)}
    constant = _constants(recipe, found, [by_id[p.candidate.candidate_id] for p in pivots]) if pivots else None
    if settings.drop_constant_wins and constant is not None:
        pivots, constant = _unlike_constants(pivots, constant, source)
    ids = {p.candidate.candidate_id for p in pivots}
    print(survival_tables(train, [fate(p, ids, settings.lambda_diff) for p in train]))
    if not pivots:
        raise InputError(
            Problem(
                str(source),
                None,
                "select.rule",
                f"{settings.rule} with lambda_diff {settings.lambda_diff} keeps none of {len(train)} candidates",
                "check the verifier (are all rewards 0?) and tool names, raise lambda_diff, or profile with more generations",
            )
        )
    version = digest(sorted(p.candidate.candidate_id for p in pivots))
    chosen = {id(p) for p in pivots}
    kept = [place for p, place in zip(train, places, strict=True) if id(p) in chosen]
    header = Header(
        stage="pivots",
        config_hash=recipe.digest("select"),
        parent=file_digest(source),
        tokenizer=found.tokenizer,
        chat_template=found.chat_template,
        policy=found.policy,
        verifier=found.verifier,
        extra=moved_reference(found, source, target)
        | {
            "rule": settings.rule,
            "lambda_diff": settings.lambda_diff,
            "version": version,
            "sampling": found.extra["sampling"],
            "pivots": len(pivots),
            **({"drop_constant_wins": True} if settings.drop_constant_wins else {}),
        },
        settings={**found.settings, **recipe.told("select")},
    )
    path = write_artefact(target, header, map(_pivot_row, rows_at(source, [*kept, *held_out])))
    print(
        f"{len(pivots)} pivots of {len(train)} candidates, {len(held_out)} held-out states; version {version} -> {path}"
    )
    talk = sum(p.candidate.action_name == "message" for p in pivots)
    stage = "select" if settings.output == "pivots.jsonl" else f"select {settings.output}"
    conclude(Path(recipe.run_dir), stage, pivot_checks(len(pivots), talk, constant and constant.best()))
    return path


@dataclass(frozen=True, slots=True)
class Constants:
    """What constant answers earn on the pivots that they were tried on."""

    earned: Earned
    tried: int

    def best(self) -> tuple[str, float]:
        """The best answer and its mean reward."""
        return best(self.earned, self.tried)

    def without(self, dropped: Mapping[str, str]) -> Constants:
        """Over the pivots that are left."""
        left = {a: {c: r for c, r in rewards.items() if c not in dropped} for a, rewards in self.earned.items()}
        ordered = dict(sorted(left.items(), key=lambda pair: -sum(pair[1].values())))
        return Constants({a: r for a, r in ordered.items() if r}, self.tried - len(dropped))


def _unlike_constants(pivots: list[Profile], constant: Constants, source: Path) -> tuple[list[Profile], Constants]:
    """The pivots that no constant answer wins, and what constant answers earn on them. Raises InputError where there is none."""
    before, easy = len(pivots), won(constant.earned)
    if len(easy) == before:
        told = f"a constant answer wins all {before} pivots, first {constant.best()[0]}"
        remedy = "use a verifier that tells answers apart (a judge for talk), or verifier.message=exclude"
        raise InputError(Problem(str(source), None, "select.drop_constant_wins", told, remedy))
    print(f"{len(easy)} of {before} pivots are won by a constant answer and left out")
    return [p for p in pivots if p.candidate.candidate_id not in easy], constant.without(easy)


def _constants(recipe: Recipe, found: Header, places: Sequence[int]) -> Constants | None:
    """What constant answers earn on the pivots: on `audit.sample` of them, on all where such pivots are to be dropped.

    None where the recipe's verifier is not the profile's, or a judge would have to be asked. Raises InputError for these where
    pivots are to be dropped.
    """
    drop = recipe.select.drop_constant_wins
    verifier, verifier_id = load_recipe_verifier(recipe)
    why = f"the profile was judged by {found.verifier}, the recipe has {verifier_id}" * (verifier_id != found.verifier)
    if not why and verifier.asks_judge and not drop:
        why = "the verifier asks a judge (select.drop_constant_wins=true asks it for every pivot)"
    if why:
        if drop:
            remedy = "give the recipe of the profile, or run rescore and select from its output"
            raise InputError(Problem("recipe", None, "select.drop_constant_wins", why, remedy))
        print(f"constant answers are not tried: {why}")
        return None
    size, source = 0 if drop else recipe.audit.sample, recipe.path(recipe.select.profiles)
    tried = list(map(open_states(source).candidate, rows_at(source, _spread(places, size))))
    earned = earnings(verifier, tried, [c.expected for c in tried], recipe.profile.max_retries)
    return Constants(earned, len(tried))


def _spread(places: Sequence[int], size: int) -> Sequence[int]:
    """So many of the places, evenly spaced; 0: all."""
    if not size or size >= len(places):
        return places
    return [places[n * len(places) // size] for n in range(size)]


def check_decided(recipe: Recipe, train: Sequence[Profile], plan: StoppingRule, source: Path) -> None:
    """Refuse a rule or lambda_diff that curtailed samples leave open, unless the recipe goes by their rate. Raises InputError."""
    settings = recipe.select
    if (
        settings.rule == "random"
    ):  # how many `adv` would keep is all that it asks, and rates so far are good enough for that
        return
    undecided = sum(
        not plan.decided_at(settings.lambda_diff, settings.rule, settings.inclusive, p.rewards)
        for p in train
        if p.failure is None
    )
    if not undecided:
        return
    if settings.undecided == "by_rate":
        print(f"{undecided} candidates are not decided by their samples and go by their hit rate so far")
        return
    drawn = f"rule {plan.rule}, lambda_diff {plan.lambda_low:g} to {plan.lambda_high:g}"
    found = (
        f"{settings.rule} with lambda_diff {settings.lambda_diff:g} is open for {undecided} of {len(train)} candidates"
    )
    remedy = (
        f"the profile was drawn to decide {drawn}: run profile again with this rule or a wider profile.lambda_interval (it keeps "
        "all samples and adds what is missing), or set select.undecided=by_rate"
    )
    raise InputError(Problem(str(source), None, "select.lambda_diff", found, remedy))


def _pivot_row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("samples", "profile")}
    return kept | {
        "tokens_prompt": row["profile"]["tokens_prompt"]
    }  # training need not render a state to know that it fits


def fate(profile: Profile, pivots: set[str], lambda_diff: float) -> str:
    """What became of a candidate: `pivot`, `all 0`, `all 1`, `all equal`, `too easy`, `not drawn` (limit, ratio, constant answer),
    `left out` (the expert talks, and no judge compares texts), or `failed`."""
    if profile.candidate.candidate_id in pivots:
        return "pivot"
    if profile.failure is not None:
        return "left out" if profile.failure == TALK else "failed"
    stats = selection.statistics(profile.rewards)
    if stats.variance <= 1e-12:
        return "all 0" if stats.mean == 0.0 else "all 1" if stats.mean == 1.0 else "all equal"
    return "not drawn" if selection.keep_pivot(stats, "adv", lambda_diff) else "too easy"


def length_band(tokens: int) -> str:
    """The table row a prompt of so many tokens belongs to: each as wide as all before it."""
    high = max(SHORTEST, 1 << (tokens - 1).bit_length()) if tokens > 0 else SHORTEST
    return f"{high // 2 + 1 if high > SHORTEST else 0}-{high}"


KEYS: Mapping[str, Callable[[Profile], str]] = {
    "depth": lambda p: depth_band(p.candidate.depth),
    "prompt": lambda p: length_band(p.tokens_prompt),
    "action": lambda p: p.candidate.action_name,
    "task": lambda p: p.candidate.task_id,
}
"""What a candidate is grouped by in tables."""
FATES = ("pivot", "all 0", "all 1", "all equal", "too easy", "not drawn", "left out", "failed")


def depth_band(depth: int) -> str:
    """The table row a depth belongs to."""
    low, high = next(band for band in DEPTHS if band[0] <= depth <= band[1])
    return str(low) if low == high else f"{low}-{high}" if high < 10**9 else f"{low}+"


def survival(
    train: Sequence[Profile], fates: Sequence[str], key: Callable[[Profile], str]
) -> dict[str, dict[str, int]]:
    """Counts of each fate by `key`; `fates` holds each profile's."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(FATES, 0))
    for p, found in zip(train, fates, strict=True):
        table[key(p)][found] += 1
    return dict(table)


def survivals(train: Sequence[Profile], fates: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """`survival` by `depth`, `prompt` length, the expert's `action` and `task` (the most frequent), each in the order to show."""
    by = {name: survival(train, fates, key) for name, key in KEYS.items()}
    return {name: by_number(table) if name in ("depth", "prompt") else by_size(table) for name, table in by.items()}


def by_number(table: dict[str, Counts]) -> dict[str, Counts]:
    """Rows in the order of the numbers that their names begin with."""
    return dict(sorted(table.items(), key=lambda kv: int(kv[0].rstrip("+").split("-")[0])))


def by_size(table: dict[str, Counts], of: str | None = None) -> dict[str, Counts]:
    """The rows that count most (in all, or `of` one thing), and the sum of all others."""

    def size(row: Counts) -> float:
        return sum(row.values()) if of is None else row[of]

    rows = sorted(table.items(), key=lambda kv: (-size(kv[1]), kv[0]))
    if len(rows) <= SHOWN + 1:
        return dict(rows)
    rest = {name: sum(row[name] for _, row in rows[SHOWN:]) for name in rows[0][1]}
    return dict(rows[:SHOWN]) | {f"({len(rows) - SHOWN} others)": rest}


def survival_tables(train: Sequence[Profile], fates: Sequence[str]) -> str:
    """Survival by depth, prompt length, the expert's tool and task, and how many pivots a trajectory keeps, as text."""
    title = f"what became of the {len(train):,} candidates of the train split (held-out states pass unfiltered)"
    titles = {"depth": "depth", "prompt": "tokens of the prompt", "action": "expert action", "task": "task"}
    lines = [title]
    for name, table in survivals(train, fates).items():
        lines += _table(titles[name], list(table.items()))
    owners: Counter[str] = Counter()
    for p, found in zip(train, fates, strict=True):
        owners[p.candidate.trajectory_id] += found == "pivot"
    kept = Counter(owners.values())
    spread = ", ".join(f"{n}: {kept[n]}" for n in sorted(kept)[:12])
    return "\n".join([*lines, f"pivots per trajectory (pivots: trajectories): {spread}"])


def _table(title: str, rows: Sequence[tuple[str, dict[str, int]]]) -> list[str]:
    used = [f for f in FATES if any(row[f] for _, row in rows)]
    lines = [f"{title:<28}{'all':>8}" + "".join(f"{f:>11}" for f in used)]
    return lines + [
        f"{short(name, 27):<28}{sum(row.values()):>8}" + "".join(f"{row[f]:>11}" for f in used) for name, row in rows
    ]
