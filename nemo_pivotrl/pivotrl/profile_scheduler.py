"""How a profile's rollouts are drawn: candidates in units, each of them in waves, as many units at a time as keep the sampler busy.

A unit's candidates draw together; after every wave each of them asks its plan how many more samples it needs, and the unit
comes back with the next wave until all are finished. Units do not wait for each other, so one long answer holds up its own unit
and nothing else, and while a wave is judged the sampler draws for another unit. What is drawn depends on candidate and k
alone, never on what ran beside it.
"""

from __future__ import annotations

import math
import queue
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.core.artifacts import json_bytes
from nemo_pivotrl.core.types import Candidate

SUSPICIOUS = math.log(1e-6)
UNITS_OF_ONE_PROCESS = 2
"""A sampler in this process draws for one unit while another one is judged."""

LOOK_S = 0.02
"""Seconds after which a full sampler is asked again whether it has room: single answers of a wave free it, too."""
END = object()


@dataclass(slots=True)
class CandidateProgress:
    """A candidate that is being profiled."""

    place: int
    """In its chunk."""
    line: bytes
    """Its row in the candidates file."""
    candidate_id: str
    trajectory_id: str
    plan: StoppingRule
    candidate: Candidate | None = None
    """Read from `line` when it is needed."""
    prompt: array[int] | None = None
    prompt_tokens: int = 0
    rows: dict[int, bytes] = field(default_factory=dict)
    """k -> rollout, as JSON."""
    rewards: dict[int, float] = field(default_factory=dict)
    """k -> verdict, of those that have one."""
    unjudged: dict[int, dict[str, Any]] = field(default_factory=dict)
    """k -> rollout that was drawn and has no verdict yet."""
    tokens: dict[int, int] = field(default_factory=dict)
    """k -> tokens generated."""
    faults: Counter[int] = field(default_factory=Counter)
    """k -> how often it could not be drawn or judged."""
    failure: str | None = None
    """Why it is given up."""
    detail: str = ""
    """Of a state that cannot be rendered: what the template or the tokenizer said."""
    repeats: dict[int, tuple[str, float]] = field(default_factory=dict)
    """k -> text and log-probability, to find samplers that ignore their seeds."""
    end: int = 0
    """After the greatest k that was drawn or tried."""

    @property
    def state(self) -> Candidate:
        """The candidate, once it is read."""
        assert self.candidate is not None
        return self.candidate

    def asks(self) -> list[int]:
        """The k that are to be drawn or judged next; none when the candidate is finished."""
        if self.failure is not None:
            return []
        if self.end > len(self.rewards):
            return [k for k in range(self.end) if k not in self.rewards]
        return list(range(self.end, self.end + self.plan.ask(list(self.rewards.values()))))

    def add(self, k: int, row: dict[str, Any]) -> bytes:
        """Take a rollout in, judged or not; its JSON."""
        self.rows[k] = found = json_bytes(row)
        self.tokens[k] = row["tokens"]
        self.repeats[k] = (row["text"], row["log_prob"])
        self.end = max(self.end, k + 1)
        if "reward" in row:
            self.rewards[k] = row["reward"]
            self.unjudged.pop(k, None)
        else:
            self.unjudged[k] = row
        return found

    def fail(self, k: int, kind: str, retries: int) -> None:
        """Count a fault; the candidate is given up when there are more of them than `retries`."""
        self.faults[k] += 1
        self.end = max(self.end, k + 1)
        if self.faults[k] > retries:
            self.failure = kind

    def looks_seeded_alike(self) -> bool:
        """Whether all of several samples are one and the same although chance would hardly make them so."""
        if len(self.repeats) < 2 or len({text for text, _ in self.repeats.values()}) > 1:
            return False
        return (len(self.repeats) - 1) * next(iter(self.repeats.values()))[1] < SUSPICIOUS


Wave = list[tuple[CandidateProgress, list[int]]]
"""Members and which of their rollouts are drawn together."""


@dataclass(slots=True)
class WorkItem:
    """Candidates that draw together: all of a chunk, or with servers those of one trajectory in it."""

    chunk: int
    members: list[CandidateProgress]
    wave: Wave = field(default_factory=list)
    """Who draws what next; nobody when the unit is finished."""
    _open: list[CandidateProgress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open = self.members
        self.advance()

    def advance(self) -> None:
        """Ask every member for its next rollouts, after a wave is taken in."""
        asked = [(member, member.asks()) for member in self._open]
        self.wave = [(member, ks) for member, ks in asked if ks]
        self._open = [member for member, _ in self.wave]


Judged = list[tuple[CandidateProgress, int, dict[str, Any]]]
"""A member's k-th rollout as a profile keeps it. With a `fault` in place of its verdict, or of all of it, it is tried again."""


def run_waves(
    units: Iterator[WorkItem | None],
    draw: Callable[[Wave], Any],
    judge: Callable[[Wave, Any], Judged],
    concurrency: int = 1,
    under_way: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[WorkItem, Judged]]:
    """Waves of all units as they are judged. The caller takes each in and has its unit `advance`, before it asks for the next.

    concurrency: rollouts that are drawn at a time. 1: `draw` is called in this thread alone, one wave after another; else in threads,
    as many as keep so many rollouts `under_way`, which counts those that were asked for and have not come. A unit that is
    finished when it begins comes with no rollouts. `units` may give None for "not now": it is asked again when something has ended.
    """
    here = concurrency == 1
    most = UNITS_OF_ONE_PROCESS if here else concurrency
    ready: deque[WorkItem] = deque()
    ended: queue.SimpleQueue[tuple[WorkItem, Future[Judged]]] = queue.SimpleQueue()
    running, more, stalled = 0, True, False
    pool = ThreadPoolExecutor(most)

    def whole(wave: Wave) -> Judged:
        return judge(wave, draw(wave))

    def room() -> bool:
        return running < most and (here or under_way() < concurrency)

    try:
        while running or ready or more:
            if more and not ready and room():
                unit = next(units, END)
                more, stalled = unit is not END, unit is None
                if isinstance(unit, WorkItem):
                    if unit.wave:
                        ready.append(unit)
                    else:
                        yield unit, []
                    continue
            if ready and room():
                unit = ready.popleft()
                job = pool.submit(judge, unit.wave, draw(unit.wave)) if here else pool.submit(whole, unit.wave)
                job.add_done_callback(partial(_hand_over, ended, unit))
                running += 1
                if ended.empty():
                    continue  # the sampler need not wait for the verifier
            if running and (found := _next(ended, room() and (bool(ready) or (more and not stalled)))):
                unit, job = found
                running -= 1
                yield unit, job.result()
                if unit.wave:
                    ready.append(unit)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _hand_over(ended: queue.SimpleQueue[tuple[WorkItem, Future[Judged]]], unit: WorkItem, job: Future[Judged]) -> None:
    ended.put((unit, job))


def _next(
    ended: queue.SimpleQueue[tuple[WorkItem, Future[Judged]]], look_only: bool
) -> tuple[WorkItem, Future[Judged]] | None:
    """The next wave that has ended; None where there is room for others, or may be by now."""
    try:
        return ended.get(block=not look_only, timeout=LOOK_S)
    except queue.Empty:
        return None


def units_of(chunk: int, members: Sequence[CandidateProgress], together: bool) -> list[WorkItem]:
    """A chunk's units: all of it, or one for each trajectory, whose states begin alike and share a server's prefix cache."""
    if together:
        return [WorkItem(chunk, list(members))]
    of: dict[str, list[CandidateProgress]] = {}
    for member in members:
        of.setdefault(member.trajectory_id, []).append(member)
    return [WorkItem(chunk, group) for group in of.values()]
