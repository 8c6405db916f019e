"""Drawing a profile's rollouts: the chunks one process works on, from their candidates to their finished rows."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.backends.base import Sampler
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.components.rollout import SUSPICIOUS_GROUPS, drawn_row, judge_all, judged_row, sample_seeds
from nemo_pivotrl.config import ProfileStage, Recipe
from nemo_pivotrl.core.artifacts import Header
from nemo_pivotrl.core.errors import UNRENDERABLE, InputError, Problem, UnrenderableState
from nemo_pivotrl.core.types import Action, FailedSample, Sample
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.pivotrl.candidate_index import Index
from nemo_pivotrl.pivotrl.profile_rows import drawn_of_row, member_line
from nemo_pivotrl.pivotrl.profile_scheduler import CandidateProgress, Judged, Wave, WorkItem, units_of
from nemo_pivotrl.pivotrl.profile_shards import Journal, ShardStore
from nemo_pivotrl.verifiers.base import Bounded, Verifier, VerifierFault

OPEN_CHUNKS = 16
"""Chunks that are in work at a time at most, when stragglers hold the first of them up; what bounds the memory."""
JUDGED_BEFORE_STOPPING = 200
"""Failures are no share of fewer candidates than this."""


FAULTS = {
    "sampler_unreachable": "transport",
    "sampler_http": "transport",
    "sampler_timeout": "timeout",
    "sampler_malformed": "parser",
    "context_overflow": "context_overflow",
}


OF_THE_STATE = ("context_overflow", "message_excluded", *UNRENDERABLE)
"""Failures that are no fault of policy or machines: the state does not fit, the expert's talk is not judged, nothing renders."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a profile is made with and belongs to."""

    header: Header
    index: Index
    chat: Chat
    verifier: Bounded
    verifier_id: str
    plan: StoppingRule


def draw_wave(recipe: Recipe, job: Job, sampler: Sampler, wave: Wave) -> list[list[Sample | FailedSample]]:
    """One wave's samples, group by group; none of a state that does not fit the context, or of what only lacks its verdict."""
    for member, _ in wave:
        render(job.chat, job.index, member)
        if member.candidate is not None and job.verifier.excludes(member.candidate.case):
            member.failure = "message_excluded"
        if (
            member.failure is None
            and member.prompt_tokens + recipe.policy.generation.max_new_tokens > recipe.policy.max_total_sequence_length
        ):
            member.failure = "context_overflow"
    asked = [(m, [k for k in ks if k not in m.unjudged]) for m, ks in wave]
    inside = [(m, ks) for m, ks in asked if ks and m.failure is None]
    seeds = [sample_seeds(("profile", recipe.rollout_seed, m.candidate_id), ks) for m, ks in inside]
    prompts = [list(m.prompt or ()) for m, _ in inside]
    drawn = iter(sampler.infer(prompts, seeds, job.chat.stop_ids, recipe.policy.generation) if inside else [])
    return [next(drawn) if ks and m.failure is None else [] for m, ks in asked]


def render(chat: Chat, index: Index, member: CandidateProgress) -> None:
    """Read a member's candidate and tokenise its prompt, where that is not done; a state that cannot be rendered fails."""
    if member.candidate is None or member.prompt is None:
        member.candidate = index.candidate(member.line)
        try:
            member.prompt = array("i", chat.prompt_ids(member.candidate.messages, member.candidate.tools))
        except UnrenderableState as error:
            member.failure, member.detail, member.prompt = error.kind, error.found, array("i")
        member.prompt_tokens = len(member.prompt)


def judge_wave(
    chat: Chat,
    verifier: Verifier,
    retries: Callable[[str], int],
    wave: Wave,
    samples: Sequence[Sequence[Sample | FailedSample]],
) -> Judged:
    """Verdicts on one wave's samples, and on earlier ones that lack theirs; faults are retried as often as their kind allows."""
    judged: Judged = []
    turns: list[tuple[CandidateProgress, int, dict[str, Any], Action]] = []
    for (member, ks), group in zip(wave, samples, strict=True):
        drawn = iter(group)
        for k in ks if member.failure is None else ():
            if k in member.unjudged:
                row = member.unjudged[k]
                turns.append((member, k, row, action_of_row(row["action"])))
            elif isinstance(sample := next(drawn), FailedSample):
                judged.append((member, k, {"fault": sample.kind}))
            else:
                text = chat.decode(sample.token_ids)
                action = chat.parse(text, member.state.tools)
                turns.append((member, k, drawn_row(sample, text, action), action))
    cases = [(m.state.case, action, row["finish_reason"]) for m, _, row, action in turns]
    for (member, k, row, _), result in zip(turns, judge_all(verifier, cases, retries), strict=True):
        if isinstance(result, VerifierFault):
            judged.append((member, k, row | {"fault": result.kind}))
        else:
            judged.append((member, k, judged_row(row, result)))
    return judged


def fault_class(kind: str) -> str:
    """The class of a named fault: transport, timeout, parser, judge, sandbox, row, context_overflow or other.

    `row` is a fault of the data (an expert action that cannot be read), which no retry mends. A verifier of one's own names its
    faults `judge_...`, `sandbox_...` or by a class.
    """
    if kind in FAULTS or kind in FAULTS.values():
        return FAULTS.get(kind, kind)
    first = kind.partition("_")[0]
    return first if first in ("judge", "sandbox", "row") else "row" if first == "expected" else "other"


def retries_of(settings: ProfileStage, kind: str) -> int:
    """How often a fault of some kind is tried again; one of the data never."""
    name = fault_class(kind)
    return 0 if name == "row" else settings.retries.get(name, settings.max_retries)


class Work:
    """One process's chunks: units for `run_waves`, judged waves into journals, finished chunks into the folder."""

    def __init__(
        self,
        recipe: Recipe,
        index: Index,
        plan: StoppingRule,
        parts: ShardStore,
        together: bool,
        measure: Callable[[CandidateProgress], None],
    ):
        self.recipe, self.index, self.plan, self.parts, self.together = recipe, index, plan, parts, together
        self.measure = measure
        """Finds out how long a member's prompt is, where all of its rollouts were there already."""
        self.open: dict[int, tuple[list[CandidateProgress], Journal, int]] = {}
        """Chunk to its members, its journal, and units that are not finished."""
        self.spent: Counter[str] = Counter()
        """For the ledger; a prompt's tokens once, however many rollouts it begins."""
        self.failed: Counter[str] = Counter()
        self.earlier = Earlier(recipe.path("profiles.earlier.jsonl"))
        temperature = recipe.policy.generation.temperature
        self.alike_allowed = SUSPICIOUS_GROUPS if temperature > 0 else recipe.profile.candidates_per_chunk + 1

    def units(self) -> Iterator[WorkItem | None]:
        """Units of chunks as they are claimed; None where enough chunks are open for now."""
        while True:
            if len(self.open) >= OPEN_CHUNKS:
                yield None
                continue
            if (number := self.parts.claim()) is None:
                return
            members = self.members(number)
            journal = self.parts.journal(number)
            for (place, k), row in sorted(journal.found.items()):
                members[place].add(k, row)  # the last record of a rollout is the one with its verdict
            units = units_of(number, members, self.together)
            self.open[number] = (members, journal, len(units))
            yield from units

    def members(self, number: int) -> list[CandidateProgress]:
        """A chunk's candidates with the rollouts that an earlier profile has of them."""
        settings, plan = self.recipe.profile, self.plan
        every = dataclasses.replace(plan, curtailed=False)
        made = []
        for place, entry in enumerate(self.index.read(number)):
            control = is_control(self.recipe.seed, entry.candidate_id, settings.control_share)
            member = CandidateProgress(
                place, entry.line, entry.candidate_id, entry.trajectory_id, every if control else plan
            )
            for k, row in self.earlier.rollouts(self.index.place(number, place)):
                member.add(k, row)
            made.append(member)
        return made

    def go(self, waves: Iterable[tuple[WorkItem, Judged]], cost: dict[str, Any]) -> None:
        """Take every wave in, and note what was spent in `cost`.

        Raises InputError when too much fails, or when samples repeat as if seeds did.
        """
        total = sum(self.index.rows_of(n) for n in range(self.parts.chunks))
        done = total - sum(self.index.rows_of(n) for n in self.parts.missing())
        with progress(total, done, "profile", "cand") as bar:
            for unit, judged in waves:
                self.take(unit, judged)
                cost.update(self.spent)
                if not unit.wave:
                    self.finish(unit)
                    bar.update(len(unit.members))
                    bar.set_postfix(self.shown(), refresh=False)

    def close(self) -> None:
        """Close the journals that are open."""
        for _, journal, _ in self.open.values():
            journal.close()

    def shown(self) -> dict[str, str]:
        """What the bar says beside rate and remaining time."""
        finished, rollouts = max(1, self.spent["candidates"]), self.spent["rollouts"]
        found = {
            "rollouts": f"{rollouts:,}",
            "each": f"{rollouts / finished:.1f}",
            "tokens": f"{self.spent['tokens_generated']:,}",
        }
        return found | ({"failed": str(self.failed.total())} if self.failed else {})

    def take(self, unit: WorkItem, judged: Judged) -> None:
        """One wave into members and journal."""
        lines = []
        for member, k, row in judged:
            fresh = "text" in row and k not in member.rows
            if "text" in row:
                lines.append((member.place, k, member.add(k, row)))
            if fresh:
                self.spent["rollouts"] += 1
                self.spent["tokens_generated"] += row["tokens"]
                self.spent["tokens_prompt"] += member.prompt_tokens if len(member.rows) == 1 else 0
            if "fault" in row:
                # the verifier was asked again already; what was lost on the way is drawn again
                again = 0 if "text" in row else retries_of(self.recipe.profile, row["fault"])
                member.fail(k, row["fault"], again)
                self.spent["faults"] += 1
        if lines:
            self.open[unit.chunk][1].write(lines)
        unit.advance()

    def finish(self, unit: WorkItem) -> None:
        """Count a finished unit, and publish its chunk when it was the last one."""
        for member in unit.members:
            if not member.prompt_tokens and member.failure not in UNRENDERABLE:
                self.measure(member)
            member.candidate = member.prompt = None  # the chunk may wait for others for long
            if member.failure is not None:
                self.failed[member.failure] += 1
        self.spent["candidates"] += len(unit.members)
        self.stop_if_too_much_failed()
        members, journal, left = self.open[unit.chunk]
        if left > 1:
            self.open[unit.chunk] = (members, journal, left - 1)
            return
        alike = sum(m.looks_seeded_alike() for m in members)
        if alike >= self.alike_allowed:
            found = f"{alike} of {len(members)} candidates have the same improbable completion in every sample"
            remedy = "the sampler ignores the per-sample seed: drop request seeds, check the backend, profile with fresh=true"
            raise InputError(Problem("sampler", None, "samples", found, remedy))
        journal.close()
        self.parts.publish(unit.chunk, [member_line(m, self.plan) for m in members], self.index.ids[unit.chunk])
        del self.open[unit.chunk]

    def stop_if_too_much_failed(self) -> None:
        """End a run whose failures have outgrown their budget; what was drawn is kept, and what failed is tried again."""
        faults = sum(count for kind, count in self.failed.items() if transient(kind))
        of = max(self.spent["candidates"], min(JUDGED_BEFORE_STOPPING, len(self.index)))
        if faults > self.recipe.profile.max_failure_share * of:
            raise InputError(too_many(str(self.parts.folder), faults, self.spent["candidates"], self.failed))


def transient(failure: str | None) -> bool:
    """Whether a candidate that failed so may be profiled some other time: the fault was not its state's own."""
    return failure is not None and failure not in OF_THE_STATE


def too_many(where: str, faults: int, of: int, failed: Counter[str]) -> Problem:
    """What is said when the budget for failures is spent."""
    found = f"{faults} of {of} candidates could not be judged: {dict(failed)}"
    remedy = "mend the cause and run the same command again, with profile.retry_failed=true if it had ended; or accept a larger share"
    return Problem(where, None, "profile.max_failure_share", found, remedy)


def is_control(seed: int, candidate_id: str, share: float) -> bool:
    """Whether a candidate is one of those that get all K rollouts."""
    return int(selection.order_key(seed, "control " + candidate_id)[:8], 16) < share * 2**32


class Earlier:
    """The rollouts of a finished profile that another one begins with; none where there is no such file."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets: list[int] = []
        if path.exists():
            with path.open("rb") as file:
                at = len(file.readline())
                for line in file:
                    self.offsets.append(at)
                    at += len(line)

    def rollouts(self, number: int) -> list[tuple[int, dict[str, Any]]]:
        """(k, rollout) of the profile's `number`-th candidate."""
        if not self.offsets:
            return []
        with self.path.open("rb") as file:
            file.seek(self.offsets[number])
            return drawn_of_row(json.loads(file.readline()))
