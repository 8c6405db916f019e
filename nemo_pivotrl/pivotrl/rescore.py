"""rescore: another verifier or threshold over a profile's samples. Nothing is generated; the pivot sets are compared.

`nemo-pivotrl rescore RECIPE verifier.name=functional` writes `profiles.rescored.jsonl`; `select` reads it with
`select.profiles=profiles.rescored.jsonl` and the same verifier settings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import judge_all, judged_row, load_recipe_verifier
from nemo_pivotrl.components.stage_checks import rescore_checks
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import count_rows, file_digest, json_line, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.data.states import moved_reference, open_states
from nemo_pivotrl.pivotrl.profile import report_failures
from nemo_pivotrl.pivotrl.profile_rows import Row, light_of_row, plan_in, rescored_row
from nemo_pivotrl.pivotrl.profile_worker import transient
from nemo_pivotrl.verifiers.base import Verifier, VerifierFault

CHUNK = 64


@one_writer
def rescore(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the rescored profile and print what it changes. Raises InputError where the profile or its states are damaged."""
    source, target = recipe.path(recipe.rescore.profiles), recipe.path(recipe.rescore.output)
    if source == target:
        remedy = "give the output a name of its own: the profile is paid-for work"
        raise InputError(Problem("recipe", None, "rescore.output", str(target), remedy))
    found = read_header(source, "profiles")
    check_lineage(recipe, source, found)
    verifier, verifier_id = load_recipe_verifier(recipe)
    own = moved_reference(found, source, target) | {"rescored_from": file_digest(source), "was": found.verifier}
    header = dataclasses.replace(found, verifier=verifier_id, extra={**found.extra, **own})
    tally, make = Tally(), partial(Rescorer, recipe, source, verifier if recipe.executor == "here" else None)
    Map(
        recipe,
        "rescore",
        target,
        header,
        lambda: batches_of(read_rows(source), CHUNK, tally),
        make,
        count_rows(source),
        "cand",
        tally,
        recipe.profile.max_failure_share,
        "profile.max_failure_share",
    ).run(fresh)
    changes = difference(recipe, source, target)
    print(changes)
    s, plan = recipe.select, plan_in(found)
    rule: selection.Rule = "adv" if s.rule == "random" else s.rule
    after = [light_of_row(row) for row in read_rows(target)]
    open_ = sum(not plan.decided_at(s.lambda_diff, rule, s.inclusive, p.rewards) for p in after if p.failure is None)
    if open_:
        print(
            f"{open_} candidates are no longer decided, since this verifier sees their {plan.count} or fewer samples otherwise: "
            "select needs select.undecided=by_rate, or profile with this verifier"
        )
    failures = Counter(p.failure for p in after if p.failure)
    changed, samples = changes.flips.total(), changes.moved.total()
    checks = rescore_checks(changed, samples, len(changes.after), failures.total(), len(after))
    conclude(Path(recipe.run_dir), "rescore", checks)
    report_failures(failures, len(after), recipe, target)
    return target


class Rescorer:
    """Judges rows of a profile anew, with their states."""

    def __init__(self, recipe: Recipe, source: Path, verifier: Verifier | None = None):
        self.retries = recipe.profile.max_retries
        self.states, self.verifier = open_states(source), verifier or load_recipe_verifier(recipe)[0]

    def __call__(self, rows: Sequence[Row]) -> Found:
        """The rows with their new verdicts, and how many could not be judged."""
        turns = []
        for row in rows:
            case = self.states.candidate(row).case
            turns += [(case, action_of_row(sample["action"]), sample["finish_reason"]) for sample in row["samples"]]
        results = iter(judge_all(self.verifier, turns, self.retries))
        made, failed = [], Counter[str]()
        for row in rows:
            judged = [(sample, next(results)) for sample in row["samples"]]
            fault = next((r.kind for _, r in judged if isinstance(r, VerifierFault)), row["profile"]["failure"])
            samples = [judged_row(sample, r) for sample, r in judged if not isinstance(r, VerifierFault)]
            failed.update([fault] if transient(fault) else [])
            made.append(rescored_row(row, samples, fault))
        return Found([json_line(row) for row in made], {"candidates": len(rows)}, failed)


class Difference(NamedTuple):
    """What another verifier changes."""

    moved: Counter[int]
    """Samples whose reward rises (1), falls (-1) or stays (0)."""
    flips: Counter[tuple[str, str]]
    """Samples whose reward changes, by old and new category."""
    before: set[str]
    after: set[str]
    """Pivots by the recipe's rule."""

    def __str__(self) -> str:
        both, union = self.before & self.after, len(self.before | self.after)
        lines = [
            f"samples: {self.moved[0]} keep their reward, {self.moved[1]} gain, {self.moved[-1]} lose",
            *(f"    {count:>6}  {old} -> {new}" for (old, new), count in self.flips.most_common(10)),
            f"pivots: {len(self.before)} before, {len(self.after)} after; {len(both)} in both, {len(self.before - both)} leave, "
            f"{len(self.after - both)} come" + (f" (Jaccard {len(both) / union:.3f})" if union else ""),
        ]
        return "\n".join(lines)


def difference(recipe: Recipe, before: Path, after: Path) -> Difference:
    """Verdicts, categories and pivot sets of two profiles of the same samples."""
    found = Difference(Counter(), Counter(), _pivots(recipe, before), _pivots(recipe, after))
    for old, new in zip(read_rows(before), read_rows(after), strict=True):
        for a, b in zip(old["samples"], new["samples"], strict=False):
            found.moved[(b["reward"] > a["reward"]) - (b["reward"] < a["reward"])] += 1
            if a["reward"] != b["reward"]:
                found.flips[a["category"], b["category"]] += 1
    return found


def _pivots(recipe: Recipe, path: Path) -> set[str]:
    s = recipe.select
    train = [p for p in map(light_of_row, read_rows(path)) if p.candidate.split == "train"]
    chosen = selection.select(train, s.rule, s.lambda_diff, recipe.seed, s.inclusive, s.limit, s.max_message_ratio)
    return {p.candidate.candidate_id for p in chosen}
