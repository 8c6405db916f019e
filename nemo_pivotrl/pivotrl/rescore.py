"""rescore: another verifier or threshold over a profile's samples. Nothing is generated; the pivot sets are compared.

`nemo-pivotrl rescore RECIPE verifier.name=functional` writes `profiles.rescored.jsonl`; `select` reads it with
`select.profiles=profiles.rescored.jsonl` and the same verifier settings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.components.rollout import judge_all, load_recipe_verifier
from nemo_pivotrl.components.stage_checks import rescore_checks
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import ArtefactWriter, file_digest, is_complete, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Profile
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.pivotrl.profile import report_failures
from nemo_pivotrl.pivotrl.profile_rows import plan_in, profile_of_row, profile_to_row
from nemo_pivotrl.verifiers.base import Verifier, VerifierFault

CHUNK = 64


@one_writer
def rescore(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the rescored profile and print what it changes. Raises InputError for a profile that keeps no actions."""
    source, target = recipe.path(recipe.rescore.profiles), recipe.path(recipe.rescore.output)
    if source == target:
        remedy = "give the output a name of its own: the profile is paid-for work"
        raise InputError(Problem("recipe", None, "rescore.output", str(target), remedy))
    found = read_header(source, "profiles")
    check_lineage(recipe, source, found)
    verifier, verifier_id = load_recipe_verifier(recipe)
    header = dataclasses.replace(
        found, verifier=verifier_id, extra={**found.extra, "rescored_from": file_digest(source), "was": found.verifier}
    )
    before = [profile_of_row(row) for row in read_rows(source)]
    if is_complete(target, header, fresh):
        print(f"{target} is complete; fresh=true makes it anew")
    else:
        with (
            ArtefactWriter(target, header, fresh) as writer,
            progress(len(before), writer.rows_done, "rescore", "cand") as bar,
        ):
            rest = iter(before[writer.rows_done :])
            while chunk := list(islice(rest, CHUNK)):
                rescored = _rescore(chunk, verifier, recipe.profile.max_retries, source)
                writer.write(profile_to_row(p, recipe.extract.agent_ref) for p in rescored)
                bar.update(len(chunk))
            writer.finish()
    after = [profile_of_row(row) for row in read_rows(target)]
    print(difference(recipe, before, after))
    s, plan = recipe.select, plan_in(found)
    rule: selection.Rule = "adv" if s.rule == "random" else s.rule
    open_ = sum(not plan.decided_at(s.lambda_diff, rule, s.inclusive, p.rewards) for p in after if p.failure is None)
    if open_:
        print(
            f"{open_} candidates are no longer decided, since this verifier sees their {plan.count} or fewer samples otherwise: "
            "select needs select.undecided=by_rate, or profile with this verifier"
        )
    failures = Counter(p.failure for p in after if p.failure)
    pairs = [
        (a["reward"], b["reward"])
        for o, n in zip(before, after, strict=True)
        for a, b in zip(o.samples, n.samples, strict=False)
    ]
    changed, pivots = sum(a != b for a, b in pairs), len(_pivots(recipe, after))
    checks = rescore_checks(changed, len(pairs), pivots, failures.total(), len(after))
    conclude(Path(recipe.run_dir), "rescore", checks)
    report_failures(failures, len(after), recipe, target)
    return target


def _rescore(profiles: Sequence[Profile], verifier: Verifier, max_retries: int, source: Path) -> list[Profile]:
    turns = []
    for profile in profiles:
        for sample in profile.samples:
            if "action" not in sample:
                remedy = "this profile is of version 0.1 and keeps no actions; profile again"
                raise InputError(Problem(str(source), None, "samples.action", "missing", remedy))
            turns.append((profile.candidate.case, action_of_row(sample["action"]), sample["finish_reason"]))
    results = iter(judge_all(verifier, turns, max_retries))
    made = []
    for profile in profiles:
        judged = [(sample, next(results)) for sample in profile.samples]
        fault = next((r.kind for _, r in judged if isinstance(r, VerifierFault)), profile.failure)
        samples = tuple(
            {**sample, "reward": r.reward, "category": r.category}
            for sample, r in judged
            if not isinstance(r, VerifierFault)
        )
        made.append(dataclasses.replace(profile, samples=() if fault else samples, failure=fault))
    return made


def difference(recipe: Recipe, before: Sequence[Profile], after: Sequence[Profile]) -> str:
    """What the other verifier changes: verdicts, categories and the pivot set of the recipe's rule."""
    flips: Counter[tuple[str, str]] = Counter()
    up = down = same = 0
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old.samples, new.samples, strict=False):
            up, down, same = (
                up + (b["reward"] > a["reward"]),
                down + (b["reward"] < a["reward"]),
                same + (a["reward"] == b["reward"]),
            )
            if a["reward"] != b["reward"]:
                flips[a["category"], b["category"]] += 1
    ours, theirs = (_pivots(recipe, profiles) for profiles in (before, after))
    union = len(ours | theirs)
    lines = [
        f"samples: {same} keep their reward, {up} gain, {down} lose",
        *(f"    {count:>6}  {old} -> {new}" for (old, new), count in flips.most_common(10)),
        f"pivots: {len(ours)} before, {len(theirs)} after; {len(ours & theirs)} in both, {len(ours - theirs)} leave, "
        f"{len(theirs - ours)} come" + (f" (Jaccard {len(ours & theirs) / union:.3f})" if union else ""),
    ]
    return "\n".join(lines)


def _pivots(recipe: Recipe, profiles: Sequence[Profile]) -> set[str]:
    s = recipe.select
    train = [p for p in profiles if p.candidate.split == "train"]
    chosen = selection.select(train, s.rule, s.lambda_diff, recipe.seed, s.inclusive, s.limit, s.max_message_ratio)
    return {p.candidate.candidate_id for p in chosen}
