"""A profile's rows as items of a map: candidates that draw together, wave by wave, each until its selection is known.

After every wave each candidate asks the stopping rule how many more samples it needs. What is drawn depends on candidate and k
alone, never on what ran beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.components.durable_map import Tally
from nemo_pivotrl.components.rollout import SUSPICIOUS_GROUPS
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import json_bytes
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.pivotrl.candidate_index import Entry, Index
from nemo_pivotrl.pivotrl.profile_rows import drawn_of_row, measured
from nemo_pivotrl.pivotrl.profile_worker import Asked, Drawn, Wave, retries_of, transient

SUSPICIOUS = math.log(1e-6)


@dataclass(slots=True)
class CandidateProgress:
    """A candidate that is being profiled."""

    place: int
    """In its item."""
    line: bytes
    """Its row in the candidates file."""
    candidate_id: str
    plan: StoppingRule
    prompt_tokens: int = 0
    measured: bool = False
    """Whether a worker has seen it: only then the prompt's length is known."""
    rows: dict[int, bytes] = field(default_factory=dict)
    """k -> rollout, as JSON."""
    rewards: dict[int, float] = field(default_factory=dict)
    """k -> verdict, of those that have one."""
    unjudged: dict[int, dict[str, Any]] = field(default_factory=dict)
    """k -> rollout that was drawn and has no verdict yet."""
    tokens: int = 0
    """Generated, over all rollouts."""
    faults: Counter[int] = field(default_factory=Counter)
    """k -> how often it could not be drawn or judged."""
    failure: str | None = None
    """Why it is given up."""
    detail: str = ""
    """Of a state that cannot be rendered: what the template or the tokenizer said."""
    first: tuple[str, float] = ("", 0.0)
    """Text and log-probability of the rollout that came first, to find samplers that ignore their seeds."""
    alike: bool = True
    """Whether all rollouts have that text."""
    end: int = 0
    """After the greatest k that was drawn or tried."""

    def asks(self) -> list[int]:
        """The k that are to be drawn or judged next; none when the candidate is finished."""
        if self.failure is not None:
            return []
        if self.end > len(self.rewards):
            return [k for k in range(self.end) if k not in self.rewards]
        return list(range(self.end, self.end + self.plan.ask(list(self.rewards.values()))))

    def add(self, k: int, raw: bytes, row: dict[str, Any]) -> None:
        """Take a rollout in, judged or not; `raw` is its JSON."""
        if k not in self.rows:
            self.tokens += row["tokens"]
            self.first = self.first if self.rows else (row["text"], row["log_prob"])
            self.alike = self.alike and row["text"] == self.first[0]
        self.rows[k] = raw
        if k >= self.end:
            self.end = k + 1
        if "reward" in row:
            self.rewards[k] = row["reward"]
            if self.unjudged:
                self.unjudged.pop(k, None)
        else:
            self.unjudged[k] = row

    def fail(self, k: int, kind: str, retries: int) -> None:
        """Count a fault; the candidate is given up when there are more of them than `retries`."""
        self.faults[k] += 1
        self.end = max(self.end, k + 1)
        if self.faults[k] > retries:
            self.failure = kind

    def looks_seeded_alike(self) -> bool:
        """Whether all of several samples are one and the same although chance would hardly make them so."""
        return len(self.rows) > 1 and self.alike and (len(self.rows) - 1) * self.first[1] < SUSPICIOUS


def member_line(member: CandidateProgress, plan: StoppingRule) -> bytes:
    """A finished candidate's row: its line of the candidates file as it is, and the profile after it.

    What a failed one had drawn is kept, for when it is tried again; it has no samples and no rate.
    """
    ks = sorted(member.rows)
    kept = b",".join(member.rows[k] for k in ks)
    told: dict[str, Any] = {
        "tokens_generated": member.tokens,
        "tokens_prompt": member.prompt_tokens,
        "failure": member.failure,
        **({"detail": member.detail} if member.detail else {}),
    }
    if member.failure is not None:
        drawn = b",".join(b"[%d,%b]" % (k, member.rows[k]) for k in ks)
        tail = b',"samples":[],"profile":%b,"kept":[%b]}' % (json_bytes(told)[:-1], drawn)
    else:
        stats = selection.statistics([member.rewards[k] for k in ks])
        told |= measured(stats, plan.curtailed and not member.plan.curtailed)
        rate = (json_bytes(stats.mean), stats.count, stats.successes)
        tail = b',"pass_rate":%b,"pass_rate_total":%d,"pass_rate_passed":%d' % rate
        tail += b',"samples":[%b],"profile":%b' % (kept, json_bytes(told))
    return member.line.rstrip()[:-1] + tail + b"}\n"


@dataclass(slots=True)
class CandidateGroup:
    """Candidates that draw together: an item of the map."""

    of: Items
    members: list[CandidateProgress]
    chunk: int
    _open: list[CandidateProgress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open = self.members

    @property
    def size(self) -> int:
        """See `durable_map.Item`."""
        return len(self.members)

    def ask(self) -> Wave | None:
        """The next wave: what each member needs next; of one that is finished, its prompt's length where that is not known."""
        asked = [(m, m.asks()) for m in self._open]
        asked = [(m, ks) for m, ks in asked if ks or not m.measured]
        self._open = [m for m, _ in asked]
        return [
            Asked(m.place, m.candidate_id, m.line, ks, {k: m.unjudged[k] for k in ks if k in m.unjudged})
            for m, ks in asked
        ] or None

    def take(self, drawn: Drawn) -> bytes:
        """Take a wave in. Returns its rollouts as one line of JSON: (place, k, rollout) of each."""
        for place, tokens, failure, detail in drawn.states:
            member = self.members[place]
            member.measured, member.prompt_tokens, member.detail = True, tokens, detail
            member.failure = member.failure or failure
        lines, spent = [], self.of.tally.spent
        for place, k, raw, row in drawn.rollouts:
            member = self.members[place]
            if raw:
                if k not in member.rows:
                    spent["rollouts"] += 1
                    spent["tokens_generated"] += row["tokens"]
                    # a prompt's tokens once, however many rollouts it begins
                    spent["tokens_prompt"] += 0 if member.rows else member.prompt_tokens
                member.add(k, raw, row)
                lines.append(b"[%d,%d,%b]" % (place, k, raw))
            if "fault" in row:
                # the verifier was asked again already; what was lost on the way is drawn again
                member.fail(k, row["fault"], 0 if raw else retries_of(self.of.recipe.profile, row["fault"]))
                spent["faults"] += 1
        return b"[" + b",".join(lines) + b"]\n" if lines else b""

    def restore(self, steps: Sequence[bytes]) -> None:
        """Take in earlier waves. One that was drawn may be there again with its verdict; after that nothing can change it."""
        for step in steps:
            for place, k, row in json.loads(step):
                self.members[place].add(k, json_bytes(row), row)

    def rows(self) -> list[bytes]:
        """The finished rows. Raises InputError when samples repeat as if seeds did."""
        tally = self.of.tally
        tally.spent["candidates"] += len(self.members)
        tally.failed.update(m.failure for m in self.members if m.failure is not None and transient(m.failure))
        self.of.refuse_alike(self.chunk, sum(m.looks_seeded_alike() for m in self.members))
        return [member_line(m, self.of.plan) for m in self.members]


class Items:
    """All groups of a profile's candidates, or of some of its chunks. With `together` a chunk is a group; else each trajectory in
    it, whose states begin alike and share a server's prefix cache."""

    def __init__(self, recipe: Recipe, index: Index, plan: StoppingRule, together: bool):
        self.recipe, self.index, self.plan, self.together = recipe, index, plan, together
        self.tally = Tally()
        self.earlier = Earlier(recipe.path("profiles.earlier.jsonl"))
        self._every = dataclasses.replace(plan, curtailed=False)
        self._alike: Counter[int] = Counter()

    def of_chunks(self, chunks: range) -> Iterator[tuple[int, Callable[[], CandidateGroup]]]:
        """Items of these chunks, each by the place of its first candidate."""
        for chunk in chunks:
            start = self.index.place(chunk, 0)
            if self.together:
                yield start, partial(self._chunk, chunk)
                continue
            for _, run in groupby(self.index.read(chunk), lambda entry: entry.trajectory_id):
                entries = list(run)
                yield start, partial(self._group, chunk, start, entries)
                start += len(entries)

    def _chunk(self, chunk: int) -> CandidateGroup:
        return self._group(chunk, self.index.place(chunk, 0), self.index.read(chunk))

    def _group(self, chunk: int, start: int, entries: Iterator[Entry] | list[Entry]) -> CandidateGroup:
        """Candidates with the rollouts that an earlier profile has of them."""
        made, share = [], self.recipe.profile.control_share
        for place, entry in enumerate(entries):
            control = is_control(self.recipe.seed, entry.candidate_id, share)
            member = CandidateProgress(place, entry.line, entry.candidate_id, self._every if control else self.plan)
            for k, row in self.earlier.rollouts(start + place):
                member.add(k, json_bytes(row), row)
            made.append(member)
        return CandidateGroup(self, made, chunk)

    def refuse_alike(self, chunk: int, count: int) -> None:
        """Count candidates whose samples are all alike. Raises InputError where a chunk has too many of them."""
        self._alike[chunk] += count
        if self.recipe.policy.generation.temperature > 0 and self._alike[chunk] >= SUSPICIOUS_GROUPS:
            found = f"{self._alike[chunk]} candidates of a chunk have the same improbable completion in every sample"
            remedy = "the sampler ignores the per-sample seed: drop request seeds, check the backend, profile with fresh=true"
            raise InputError(Problem("sampler", None, "samples", found, remedy))


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
