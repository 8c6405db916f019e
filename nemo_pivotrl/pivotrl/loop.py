"""loop: rounds of profile, select and train. When the pivots have been used up, the policy in hand is profiled anew.

Round 1 lives in the run directory, so that a run of one round is what its stages are; round r in `round-0r/`, with its own
profiles, pivots and policy. A round's start policy, profiling policy and KL reference are one checkpoint: what the round
before it published. `loop.jsonl` is the history, written anew from the artefacts by a run that resumes, with the same bytes;
`final/policy` is the result.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import round_rules as rounds, selection
from nemo_pivotrl.algorithms.round_rules import Ending, Spent
from nemo_pivotrl.backends.identity import policy_revision, without_start
from nemo_pivotrl.components import checkpoint, costs as ledger
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.trackers import check_dashboards, log_summary
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import canonical_json, digest, file_digest, read_header, read_rows, write_artefact
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.data.states import moved_reference
from nemo_pivotrl.pivotrl.monitor import BASELINE
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.profile_rows import light_of_row
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.train import train

HISTORY = "loop.jsonl"
RESULT = "final"
REHEARSED = "pivots.rehearsed.jsonl"
"""A later round's pivots and those of the rounds before it."""


@dataclass(frozen=True, slots=True)
class Round:
    """A round that has ended."""

    recipe: Recipe
    pivots: frozenset[str]
    seen: frozenset[str]
    """Candidates that were profiled."""
    mastered: frozenset[str]
    """Train candidates that were won in every rollout of the profile."""
    profiled: Spent
    trained: Spent
    rows: Sequence[rounds.Row]
    ending: Ending | None
    """None: it took all its steps."""

    @property
    def policy(self) -> Path:
        return self.recipe.path(self.recipe.grpo.name) / "policy"

    def accuracy(self, place: int) -> float | None:
        """Held-out accuracy at the round's first (0) or last (-1) validation."""
        found = [float(row["val/accuracy"]) for row in self.rows if "val/accuracy" in row]
        return found[place] if found else None


@one_writer
def loop(recipe: Recipe, fresh: bool = False) -> Path:
    """Run rounds until a stop rule holds; returns the folder of the result's policy. Raises InputError as the stages do.

    Resumes wherever it was killed, and ends with the bytes of an undisturbed run.
    """
    _check(recipe)
    check_dashboards(recipe)
    if fresh:
        for folder in [*Path(recipe.run_dir).glob("round-*"), recipe.path(RESULT)]:
            shutil.rmtree(folder, ignore_errors=True)
        recipe.path(BASELINE).unlink(missing_ok=True)
    events: list[dict[str, Any]] = []

    def tell(event: str, text: str, **figures: Any) -> None:
        events.append({"event": event, **figures, "text": text})
        write_atomically(recipe.path(HISTORY), "".join(canonical_json(e) + "\n" for e in events))
        print(f"loop: {event}: {text}")

    past: list[Round] = []
    while (stop := _stop(recipe, past)) is None:
        own = _prepared(recipe, past)
        found = _round(own, past, fresh, tell)
        if isinstance(found, Ending):
            stop = found
            break
        past.append(found)
    number, folder, why = _result(past)
    result = checkpoint.share(folder, recipe.path(RESULT) / "policy")
    tell(
        "stopped",
        f"{stop.why}: {stop.text}; the result is {why}",
        why=stop.why,
        rounds=len(past),
        result={"round": number, "policy": policy_revision(result)},
    )
    return result


def _check(recipe: Recipe) -> None:
    if recipe.loop.max_rounds > 1 and recipe.vllm.servers:
        found = f"{recipe.loop.max_rounds}, with vllm.servers"
        remedy = "servers go on with the start policy when a round begins: use an engine in this job instead"
        raise InputError(Problem("recipe", None, "loop.max_rounds", found, remedy))
    if recipe.loop.round != 1:
        remedy = "`run` numbers the rounds itself; leave it out"
        raise InputError(Problem("recipe", None, "loop.round", str(recipe.loop.round), remedy))


def _stop(recipe: Recipe, past: Sequence[Round]) -> Ending | None:
    """Whether another round may begin."""
    if not past:
        return None
    last = past[-1]
    if last.ending is not None and last.ending.why in ("retention", "budget"):
        return last.ending
    if len(past) >= recipe.loop.max_rounds:
        return Ending("max_rounds", f"loop.max_rounds={recipe.loop.max_rounds}")
    ends = [past[0].accuracy(0), *(r.accuracy(-1) for r in past)]
    known = [value for value in ends if value is not None]
    if len(known) == len(ends) and (stop := rounds.impatient(known, recipe.loop)) is not None:
        return stop
    return _exhausted(recipe, _spent(past))


def _spent(past: Sequence[Round]) -> Spent:
    return sum((r.profiled + r.trained for r in past), Spent())


def _exhausted(recipe: Recipe, spent: Spent) -> Ending | None:
    budget = recipe.budget
    seconds = 0.0
    if budget.gpu_hours:
        seconds = sum(line["seconds"] for line in ledger.read_ledgers(recipe.home))
    return rounds.exhausted(spent, seconds * budget.gpus / 3600, budget)


def _prepared(recipe: Recipe, past: Sequence[Round]) -> Recipe:
    """The recipe of the next round; its folder gets what the round takes over from the run."""
    if not past:
        return recipe
    number = len(past) + 1
    judge = recipe.verifier.judge
    own = replace(
        recipe,
        run_dir=str(recipe.path(f"round-{number:02d}")),
        policy=replace(recipe.policy, model_name=str(past[-1].policy)),
        megatron=without_start(recipe.megatron),
        loop=replace(recipe.loop, round=number),
        verifier=replace(
            recipe.verifier, judge=replace(judge, cache=judge.cache or str(recipe.path("judge_cache.jsonl")))
        ),
    )
    _candidates(recipe, past, own.path("candidates.jsonl"))
    if recipe.path(BASELINE).exists():
        write_atomically(own.path(BASELINE), recipe.path(BASELINE).read_text(encoding="utf-8"))
    return own


def _candidates(recipe: Recipe, past: Sequence[Round], target: Path) -> None:
    """The candidates that the next round profiles: those of the run without the mastered ones, and the same held-out states.

    With `profile.limit`, so many of the train candidates that were profiled least often.
    """
    source = recipe.path("candidates.jsonl")
    found = read_header(source, "candidates")
    rows = {row["candidate_id"]: row["split"] for row in read_rows(source)}
    resting = {c for r in past for c in r.mastered} if recipe.loop.rest_mastered else set()
    ids = [c for c, split in rows.items() if split == "train" and c not in resting]
    ids.sort(key=lambda c: (sum(c in r.seen for r in past), selection.order_key(recipe.seed, c)))
    held_out = {c for c in past[0].seen if rows.get(c) == "validation"}
    wanted = held_out | set(ids[: recipe.profile.limit or len(ids)])
    header = replace(
        found,
        parent=file_digest(source),
        config_hash=digest([found.config_hash, sorted(wanted)]),
        extra=moved_reference(found, source, target),
    )
    if target.exists() and read_header(target, "candidates") == header:
        return
    write_artefact(target, header, (row for row in read_rows(source) if row["candidate_id"] in wanted))


def _round(own: Recipe, past: Sequence[Round], fresh: bool, tell: Callable[..., None]) -> Round | Ending:
    """Profile, select and train once; an Ending where no candidate is a pivot any more."""
    number = own.loop.round
    said = "" if number == 1 else f"round {number}: "
    print(f"\n== {said}profile")
    profiled = replace(own, audit=replace(own.audit, before_profile=False))  # the run's audit has been made
    rows = [light_of_row(row) for row in read_rows(profile(profiled, fresh))]
    cost = Spent(
        sum(len(p.samples) for p in rows), sum(p.tokens_generated for p in rows), sum(p.tokens_prompt for p in rows)
    )
    print(f"\n== {said}select")
    try:
        source = select_pivots(own, fresh)
    except InputError as error:
        if number == 1 or error.problems[0].field != "select.rule":
            raise
        return Ending("no_pivots", f"none of {len(rows)} candidates is a pivot for the policy of round {number - 1}")
    if past and own.loop.rehearse:
        own = replace(own, grpo=replace(own.grpo, pivots=REHEARSED))
        source = _with_earlier(own, past, source)
    header = read_header(source, "pivots")
    train_rows = [p for p in rows if p.candidate.split == "train" and p.failure is None]
    constant = sum(selection.statistics(p.rewards).variance <= 1e-12 for p in train_rows)
    pivots = _train_ids(own.path("pivots.jsonl"))
    figures: dict[str, Any] = {
        "round": number,
        "policy": header.policy,
        "version": header.extra["version"],
        "candidates": len(train_rows),
        "pivots": len(pivots),
        "constant_share": constant / max(1, len(train_rows)),
        "profile": dataclasses.asdict(cost),
        "overlap": rounds.overlap(past[-1].pivots, pivots) if past else None,
    }
    shared = f", {figures['overlap']:.2f} shared with the last set" if past else ""
    earlier = header.extra.get("earlier", 0)
    rehearsed = f", {earlier} of earlier rounds rehearsed" if earlier else ""
    text = (
        f"round {number}: {len(pivots)} pivots (version {header.extra['version']}) of {len(train_rows)} candidates, "
        f"{figures['constant_share']:.0%} without signal{shared}{rehearsed}"
    )
    tell("profiled", text, **figures)
    print(f"\n== {said}train")
    before = _spent(past) + cost
    until = _until(own, before, cost)
    train(own, fresh, until)
    metrics = read_metrics(own.path(own.grpo.name) / "metrics.jsonl")
    ending = until(metrics)
    mastered = frozenset(p.candidate.candidate_id for p in train_rows if p.rewards and all(r == 1.0 for r in p.rewards))
    seen = frozenset(p.candidate.candidate_id for p in rows)
    made = Round(own, pivots, seen, mastered, cost, rounds.spent_of(metrics), metrics, ending)
    _tell_end(made, before, tell)
    ends = {"accuracy_before": made.accuracy(0), "accuracy_after": made.accuracy(-1)}
    log_summary(own, "loop", {**figures, **ends, "spent": dataclasses.asdict(before + made.trained)}, step=number)
    return made


def _train_ids(path: Path) -> frozenset[str]:
    return frozenset(row["candidate_id"] for row in read_rows(path) if row["split"] == "train")


def _with_earlier(own: Recipe, past: Sequence[Round], source: Path) -> Path:
    """The round's pivots, its held-out states, and the pivots of earlier rounds that are not among them.

    Those were chosen under an earlier policy, and most of their groups are equal by now: they cost rollouts and no gradient until
    the policy begins to lose them.
    """
    found, known = read_header(source, "pivots"), set(_train_ids(source))
    earlier: dict[str, dict[str, Any]] = {}
    for made in past:
        for row in read_rows(made.recipe.path("pivots.jsonl")):
            if row["split"] == "train" and row["candidate_id"] not in known:
                earlier.setdefault(row["candidate_id"], row)
    version = digest(sorted([*known, *earlier]))
    header = replace(found, extra=found.extra | {"version": version, "earlier": len(earlier)})
    return write_artefact(own.path(REHEARSED), header, [*read_rows(source), *earlier.values()])


def _until(own: Recipe, before: Spent, profiled: Spent) -> Callable[[Sequence[rounds.Row]], Ending | None]:
    """When this round's training ends. A used-up pivot set ends it only where another round may follow and can be paid for."""

    def until(rows: Sequence[rounds.Row]) -> Ending | None:
        spent = before + rounds.spent_of(rows)
        ending = rounds.retention_lost(rows, own.loop) or _exhausted(own, spent)
        if ending is not None or own.loop.round >= own.loop.max_rounds:
            return ending
        # without the last row: what is measured at the end of a round adds to it, and must not change the decision
        steps = before + rounds.spent_of(rows[:-1]) + rounds.spent_of(rows[-2:-1]) * (1 + 2 * own.loop.std_window)
        if rounds.exhausted(steps + profiled, 0.0, own.budget) is not None:
            return None
        return rounds.saturated(rows, own.loop)

    return until


def _tell_end(made: Round, before: Spent, tell: Callable[..., None]) -> None:
    number, step = made.recipe.loop.round, int(made.rows[-1]["step"]) if made.rows else 0
    why, said = (made.ending.why, made.ending.text) if made.ending else ("steps", f"all {step} steps are done")
    event = {"steps": "ended", "budget": "ended", "retention": "lost"}.get(why, "faded")
    start, end = made.accuracy(0), made.accuracy(-1)
    spent = before + made.trained
    moved = (
        f"; held-out accuracy {start:.4f} to {end:.4f}"
        if start is not None and end is not None and why != "gain"
        else ""
    )
    tell(
        event,
        f"round {number} after step {step}: {said}{moved}; {spent.rollouts} rollouts so far",
        round=number,
        step=step,
        why=why,
        accuracy=[start, end],
        retention=next((row["retention/change"] for row in reversed(made.rows) if "retention/change" in row), None),
        spent=dataclasses.asdict(spent),
    )


def _result(past: Sequence[Round]) -> tuple[int, Path, str]:
    """(round, policy, what it is): of the rounds that kept the out-of-domain score, the first with the best held-out accuracy.

    Of a round that lost it, its last checkpoint that had kept it; without one, nothing. A run of which no round kept it has its
    start policy for a result, as round 0.
    """
    found: list[tuple[float, int, Path, str]] = []
    for made in past:
        number = made.recipe.loop.round
        if made.ending is None or made.ending.why != "retention":
            end = made.accuracy(-1)
            found.append((0.0 if end is None else end, number, made.policy, f"the policy of round {number}"))
        elif kept := checkpoint.last_held(made.recipe.path(made.recipe.grpo.name)):
            step = int(kept[0].name.removeprefix("step_"))
            end = next((float(r["val/accuracy"]) for r in made.rows if r["step"] == step and "val/accuracy" in r), 0.0)
            found.append(
                (
                    end,
                    number,
                    kept[0] / "policy",
                    f"step {step} of round {number}, the last that kept the out-of-domain score",
                )
            )
    if not found:
        return 0, Path(past[0].recipe.policy.model_name), "the start policy: no checkpoint kept the out-of-domain score"
    if all(made.accuracy(-1) is None for made in past):
        return found[-1][1:]
    best = max(found, key=lambda f: f[0])  # the first of equals
    return best[1:]


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run's rounds, oldest first; empty where there was no loop."""
    return read_metrics(run_dir / HISTORY)


def gains(events: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """(pivots accepted, points of held-out accuracy gained) by the rounds of a history."""
    pivots = sum(e["pivots"] for e in events if e["event"] == "profiled")
    ends = [e["accuracy"] for e in events if e.get("accuracy") and None not in e["accuracy"]]
    return pivots, 100 * (max(end for _, end in ends) - ends[0][0]) if ends else 0.0
