"""The verdict table that ends a stage: what its numbers say about the run, and what to do where they warn.

A stage makes `Check`s from its numbers and calls `conclude`, which prints them and keeps them in `checks.json` for the report and
the viewer. A check warns; it never stops a stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_pivotrl.core.atomic import read_json, write_atomically
from nemo_pivotrl.core.errors import printable

FILE = "checks.json"
AGAIN = "remove it: the next stage writes it anew"
MAX_TRUNCATED = 0.1
"""Share of samples cut at max_new_tokens above which the table warns. They score 0 whatever they say."""
MAX_MALFORMED = 0.1
"""Share of samples without a readable action."""
MAX_CONSTANT = 0.25
"""Mean reward of the best constant answer over the pivots."""
MAX_FALSE_ACCEPTS = 0.1
"""Share of the audit's wrong actions that the verifier accepts."""
MIN_MIXED = 0.2
"""Share of groups with unequal rewards: the others have no gradient."""
TALK = "message_excluded"
"""Kind of the candidates that are left out because the expert talks (verifier.message): no failures."""
MIN_PIVOTS = 32
MAX_KL = 1.0
"""Nats a token away from the start policy."""
ENTROPY_RANGE = (0.2, 3.0)
"""Last entropy divided by the first."""
ENDS = 5
"""Steps at either end of a training over which its noisy numbers are averaged."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    good: bool
    remedy: str = ""
    """What to do, where it is not good."""


def share_check(name: str, part: float, whole: float, limit: float, remedy: str) -> Check:
    """A share of at most `limit`. Nothing of nothing is good."""
    share = part / whole if whole else 0.0
    return Check(name, f"{share:.1%} ({part:,.0f} of {whole:,.0f})", share <= limit, remedy)


def at_least(name: str, count: int, limit: int, remedy: str) -> Check:
    return Check(name, f"{count:,}", count >= limit, remedy)


def profile_checks(summary: Mapping[str, Any]) -> list[Check]:
    """Checks of a profile's summary (`profile_statistics.summary_of`)."""
    rollouts, classes = summary["rollouts"], summary["classes"]
    drawn = sum(entry.get("candidates", 0) for entry in classes.values())
    mixed = sum(classes[name].get("train", 0) for name in ("mixed, kept", "mixed, too easy") if name in classes)
    failed = sum(summary["failures"].values())
    cut = "raise policy.generation.max_new_tokens; a reply that never ends needs the right stop token or chat template"
    unread = "see the texts in `view`: set policy.tool_parser to their format; a model that writes none learns it by `warmup`"
    return [
        share_check("truncated samples", summary["truncated"], rollouts, MAX_TRUNCATED, cut),
        share_check("malformed or empty samples", summary["malformed"], rollouts, MAX_MALFORMED, unread),
        share_check("failed candidates", failed, drawn + failed, MAX_MALFORMED, "the lines `excluded:` say why"),
        at_least(
            "train candidates with mixed rewards",
            mixed,
            MIN_PIVOTS,
            "too few to train on: extract more trajectories, or see in `view` why every sample wins or loses",
        ),
    ]


def pivot_checks(pivots: int, talk: int, best: tuple[str, float] | None) -> list[Check]:
    """Checks of a pivot set. best: the best constant answer and its mean reward over the pivots; None where it was not tried."""
    found = [
        at_least("pivots", pivots, MIN_PIVOTS, "too few to train on: raise select.lambda_diff, or extract more"),
        share_check(
            "pivots where the expert talks",
            talk,
            pivots,
            0.5,
            "a verifier hardly tells one text from another: set verifier.judge, or verifier.message=exclude",
        ),
    ]
    if best is not None:
        remedy = "the policy can learn this answer instead of the task: set select.drop_constant_wins=true, or a judge for talk"
        found.append(
            Check("best constant answer", f"{best[0]}: mean reward {best[1]:.3f}", best[1] <= MAX_CONSTANT, remedy)
        )
    return found


def audit_checks(summary: Mapping[str, Any]) -> list[Check]:
    """Checks of an audit's summary."""
    rows, candidates = summary["by_probe"].values(), summary["candidates"]
    wrong, accepted = (sum(row[key] for row in rows) for key in ("wrong", "false_accept"))
    strict = "the verifier is lenient: see by_probe in audit.json, and make it stricter or name a judge"
    return [
        share_check("wrong actions accepted", accepted, wrong, MAX_FALSE_ACCEPTS, strict),
        share_check(
            "candidates that any content wins", len(summary["unlosable"]), candidates, MAX_FALSE_ACCEPTS, strict
        ),
        share_check(
            "candidates nobody can win",
            len(summary["unwinnable"]),
            candidates,
            0.0,
            "mend these rows; audit.jsonl has them",
        ),
    ]


def training_checks(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Checks of a GRPO run's metrics; empty before its first step."""
    steps = [row for row in rows if "reward" in row]
    if not steps:
        return []
    mixed, cut, malformed = (
        fmean(row.get(key, 0.0) for row in steps) for key in ("mixed_group_share", "truncated_share", "malformed_share")
    )
    checks = [
        Check(
            "groups with a gradient",
            f"{mixed:.1%} on average",
            mixed >= MIN_MIXED,
            "the policy always wins or always loses: profile this policy anew, or see in `view` what the verifier rejects",
        ),
        Check(
            "truncated samples",
            f"{cut:.1%} on average",
            cut <= MAX_TRUNCATED,
            "raise policy.generation.max_new_tokens, and profile again",
        ),
        Check(
            "malformed samples", f"{malformed:.1%} on average", malformed <= MAX_MALFORMED, "check policy.tool_parser"
        ),
    ]
    kl = [row[key] for key in ("val/kl",) for row in rows if key in row]
    if kl:
        remedy = "lower policy.optimizer.lr, or set loss_fn.reference_policy_kl_penalty"
        checks.append(Check("distance from the start policy", f"{kl[-1]:.3f} nats a token", kl[-1] <= MAX_KL, remedy))
    entropy = [row["entropy"] for row in steps if "entropy" in row]
    if len(entropy) >= 2 * ENDS and (before := fmean(entropy[:ENDS])) > 0:
        ratio = fmean(entropy[-ENDS:]) / before
        remedy = "lower policy.optimizer.lr; falling: the policy repeats itself, rising: it unlearns"
        good = ENTROPY_RANGE[0] <= ratio <= ENTROPY_RANGE[1]
        checks.append(Check("entropy, end to start", f"{ratio:.2f} times", good, remedy))
    return checks


def table(checks: Sequence[Check]) -> str:
    """The checks as text, the remedies under those that warn."""
    lines = ["verdict"]
    for check in checks:
        lines.append(printable(f"  {'ok  ' if check.good else 'WARN'}  {check.name:<34} {check.found}"))
        lines += [] if check.good else [printable(f"        -> {check.remedy}")]
    return "\n".join(lines)


def conclude(folder: Path, stage: str, checks: Sequence[Check]) -> dict[str, float]:
    """Print the checks of a stage and keep them in the run folder. Returns `{warnings: count}`, for dashboards."""
    if checks:
        print(table(checks))
        kept = read_checks(folder) | {stage: [asdict(check) for check in checks]}
        write_atomically(folder / FILE, json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return {"warnings": float(sum(not check.good for check in checks))}


def read_checks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every stage of a run concluded, by stage."""
    path = folder / FILE
    found: dict[str, list[dict[str, Any]]] = read_json(path, {}, AGAIN) if path.exists() else {}
    return found


def warnings_of(folder: Path) -> list[str]:
    """`stage: check` for each check of a run that warned."""
    return [
        printable(f"{stage}: {c['name']}")
        for stage, checks in read_checks(folder).items()
        for c in checks
        if not c["good"]
    ]
