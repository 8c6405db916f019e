"""select: profiles -> pivots. Pure and instant; the pivot set's version is a digest of its members.

The rule applies to the train split. Held-out states pass through unfiltered: they are what training is validated on.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl import pivotrl, responses
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.curtailment import Plan
from nemo_pivotrl.records import (
    ArtefactWriter,
    Header,
    InputError,
    Problem,
    Profile,
    check_parent,
    digest,
    file_digest,
    json_line,
    read_header,
    read_rows,
)
from nemo_pivotrl.stages.profile_rows import plan_in, profile_of_row, profile_to_row

DEPTHS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 10**9))


def select(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the pivot set and print who survived. Raises InputError when nobody does."""
    source, settings = recipe.path(recipe.select.profiles), recipe.select
    found = read_header(source, "profiles")
    check_parent(source, found, recipe.path("candidates.jsonl"))
    profiles = [profile_of_row(row) for row in read_rows(source)]
    train = [p for p in profiles if p.candidate.split == "train"]
    check_decided(recipe, train, plan_in(found), source)
    held_out = [p for p in profiles if p.candidate.split == "validation" and p.failure is None]
    pivots = pivotrl.select(
        train,
        settings.rule,
        settings.lambda_diff,
        recipe.seed,
        settings.inclusive,
        settings.limit,
        settings.max_message_ratio,
    )
    print(survival_tables(train, {p.candidate.candidate_id for p in pivots}, settings.lambda_diff))
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
    header = Header(
        stage="pivots",
        config_hash=recipe.digest("select"),
        parent=file_digest(source),
        tokenizer=found.tokenizer,
        chat_template=found.chat_template,
        policy=found.policy,
        verifier=found.verifier,
        extra={
            "rule": settings.rule,
            "lambda_diff": settings.lambda_diff,
            "version": version,
            "sampling": found.extra["sampling"],
            "pivots": len(pivots),
        },
    )
    with ArtefactWriter(recipe.path(settings.output), header, fresh=True) as writer:
        writer.write(_pivot_row(p, recipe.extract.agent_ref) for p in [*pivots, *held_out])
        path = writer.finish()
    print(
        f"{len(pivots)} pivots of {len(train)} candidates, {len(held_out)} held-out states; version {version} -> {path}"
    )
    return path


def check_decided(recipe: Recipe, train: Sequence[Profile], plan: Plan, source: Path) -> None:
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


def _pivot_row(profile: Profile, agent_ref: str) -> dict[str, Any]:
    row = profile_to_row(profile, agent_ref)
    return {key: value for key, value in row.items() if key not in ("samples", "profile")}


def export(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the pivot set as header-free NeMo-Gym files, `gym/train.jsonl` and `gym/validation.jsonl`, for NeMo-RL."""
    source = recipe.path(recipe.select.output)
    read_header(source, "pivots")
    folder = recipe.path("gym")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        part = folder / f"{split}.jsonl.part"
        with part.open("wb") as out:
            out.writelines(json_line(row) for row in read_rows(source) if row["provenance"]["split"] == split)
        os.replace(part, folder / f"{split}.jsonl")
    print(f"NeMo-Gym rows -> {folder}")
    return folder


def candidates_of(path: Path, split: str) -> list[Any]:
    """Candidates of one split of a pivots or candidates artefact."""
    return [responses.candidate_of_row(row) for row in read_rows(path) if row["provenance"]["split"] == split]


def fate(profile: Profile, pivots: set[str], lambda_diff: float) -> str:
    """What became of a candidate: `pivot`, `failed`, `all 0`, `all 1`, `too easy`, or `not drawn` (limit, message ratio)."""
    if profile.candidate.candidate_id in pivots:
        return "pivot"
    if profile.failure is not None:
        return "failed"
    stats = pivotrl.statistics(profile.rewards)
    if stats.variance <= 1e-12:
        return "all 0" if stats.mean == 0.0 else "all 1" if stats.mean == 1.0 else "all equal"
    return "not drawn" if pivotrl.keep(stats, "adv", lambda_diff) else "too easy"


FATES = ("pivot", "all 0", "all 1", "all equal", "too easy", "not drawn", "failed")


def depth_band(depth: int) -> str:
    """The table row a depth belongs to."""
    low, high = next(band for band in DEPTHS if band[0] <= depth <= band[1])
    return str(low) if low == high else f"{low}-{high}" if high < 10**9 else f"{low}+"


def survival(
    train: Sequence[Profile], pivots: set[str], lambda_diff: float, key: Callable[[Profile], str]
) -> dict[str, dict[str, int]]:
    """Counts of each fate by `key`; `pivots` holds the candidate ids that were selected."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(FATES, 0))
    for p in train:
        table[key(p)][fate(p, pivots, lambda_diff)] += 1
    return dict(table)


def survival_tables(train: Sequence[Profile], pivots: set[str], lambda_diff: float) -> str:
    """Survival by depth, by the expert's tool, and how many pivots a trajectory keeps, as text."""
    by_depth = survival(train, pivots, lambda_diff, lambda p: depth_band(p.candidate.depth))
    by_tool = survival(train, pivots, lambda_diff, lambda p: p.candidate.action_name)
    by_trajectory = survival(train, pivots, lambda_diff, lambda p: p.candidate.trajectory_id)
    kept = [row["pivot"] for row in by_trajectory.values()]
    lines = _table("depth", sorted(by_depth.items(), key=lambda kv: int(kv[0].rstrip("+").split("-")[0])))
    lines += _table("expert action", sorted(by_tool.items(), key=lambda kv: -sum(kv[1].values())))
    spread = ", ".join(f"{n}: {kept.count(n)}" for n in sorted(set(kept))[:12])
    return "\n".join([*lines, f"pivots per trajectory (pivots: trajectories): {spread}"])


def _table(title: str, rows: Sequence[tuple[str, dict[str, int]]]) -> list[str]:
    used = [f for f in FATES if any(row[f] for _, row in rows)]
    lines = [f"{title:<28}{'all':>8}" + "".join(f"{f:>11}" for f in used)]
    return lines + [
        f"{name[:27]:<28}{sum(row.values()):>8}" + "".join(f"{row[f]:>11}" for f in used) for name, row in rows
    ]
