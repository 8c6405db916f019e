"""The one way in which a stage works through rows: any number at a time, anywhere, each exactly once, to an artefact in their order.

A stage gives items in order, a worker (made once where it runs), and each item's rows when it has them. This process alone writes:
what comes is appended to `ARTEFACT.journal` at once, and put in order when all is there. Whatever is killed, the same command goes on
from the journal and ends with the same bytes, as long as a result depends on its task alone.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from nemo_pivotrl.backends.executors import Executor, Here, Processes, Worker
from nemo_pivotrl.components.costs import spend
from nemo_pivotrl.components.journal import Journal
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, is_complete, json_line, read_header
from nemo_pivotrl.core.errors import InputError, Problem

JUDGED_BEFORE_STOPPING = 200
"""Failures are no share of fewer rows than this."""


class Item(Protocol):
    """Rows that are worked on together, in one task or in several, each of which may depend on the results before it."""

    size: int
    """What it is worth on the bar."""

    def ask(self) -> Any | None:
        """The next task; None when the item is finished."""
        ...

    def take(self, result: Any) -> bytes:
        """Take a task's result in. Returns what `restore` needs of it; empty for nothing, as of an item of one task."""
        ...

    def restore(self, steps: Sequence[bytes]) -> None:
        """Take in, in their order, what `take` returned before the process was killed."""
        ...

    def rows(self) -> list[bytes]:
        """The rows of a finished item, each a line with its end."""
        ...


@dataclass(slots=True)
class Tally:
    """What a map spends and what fails on the way; items add to it."""

    spent: Counter[str] = field(default_factory=Counter)
    """For the cost log."""
    failed: Counter[str] = field(default_factory=Counter)
    """Rows by kind of failure, those that count against the budget."""
    judged: int = 0
    """Rows that were finished."""
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    """As those of `Found`."""

    def cost(self) -> dict[str, Any]:
        """What the cost log says of it."""
        return {**self.spent, **self.notes}

    def shown(self) -> dict[str, str]:
        """What the bar says beside rate and remaining time."""
        found = {name: f"{count:,}" for name, count in self.spent.items() if name in ("rollouts", "tokens_generated")}
        return found | ({"failed": str(self.failed.total())} if self.failed else {})

    def check(self, where: str, field: str, max_share: float, total: int) -> None:
        """Raises InputError when failures have outgrown their budget; what was done is kept."""
        if self.failed.total() > max_share * max(self.judged, min(JUDGED_BEFORE_STOPPING, total)):
            raise InputError(too_many(where, field, self.failed, self.judged))


def too_many(where: str, field: str, failed: Counter[str], of: int) -> Problem:
    """What is said when the budget for failures is spent."""
    found = f"{failed.total()} of {of} candidates could not be judged: {dict(failed)}"
    remedy = "mend the cause and run the same command again, with profile.retry_failed=true if it had ended; or accept a larger share"
    return Problem(where, None, field, found, remedy)


@dataclass(frozen=True, slots=True)
class Map:
    """A stage's work as a map. `items`: (number of its first row, what opens it), in order; the numbers are the same in every run."""

    recipe: Recipe
    stage: str
    path: Path
    header: Header
    items: Callable[[], Iterable[tuple[int, Callable[[], Item]]]]
    make_worker: Callable[[], Worker]
    total: int | None = None
    """Rows, as the items' sizes count them."""
    unit: str = "row"
    tally: Tally = field(default_factory=Tally)
    max_failure_share: float = 1.0
    budget_field: str = ""
    belongs: Header | None = None
    """Header of unfinished work, where it has more than the artefact's: what decides where items begin."""
    empty: Callable[[], Problem] | None = None
    """What is said where there are no rows at all; without it, an artefact may be empty."""
    before: Callable[[int], None] = lambda left: None
    """Is told how many rows are left, before the first task; it may refuse them."""
    write: Callable[[Iterable[tuple[bytes, int]]], object] | None = None
    """Makes the file at `path` of the finished items' (lines, how many), in order, which it may read several times; without it they
    are the artefact's rows."""
    costs: bool = True
    """Whether there is a cost log."""

    @property
    def journal(self) -> Path:
        """Where unfinished work lies."""
        return self.path.with_name(self.path.name + ".journal")

    def run(self, fresh: bool = False) -> Path:
        """Do what is not done yet, and write the artefact. Raises InputError, OSError, and what a worker raises."""
        if is_complete(self.path, self.header, fresh):
            print(f"{self.path} is complete; fresh=true makes it anew")
            self.journal.unlink(missing_ok=True)
        else:
            self.work(fresh)
        return self.path

    def work(self, fresh: bool = False) -> None:
        """As `run`, whatever file is at `path`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.journal, (self.belongs or self.header).to_told_line().encode(), fresh)
        try:
            self._do(journal)
            if self.empty and not any(place.rows for place in journal.done.values()):
                raise InputError(self.empty())
            self._order(journal)
        finally:
            journal.close()
        self.journal.unlink(missing_ok=True)

    def _do(self, journal: Journal) -> None:
        begun = sum(place.size for place in journal.done.values())
        with (
            spend(Path(self.recipe.run_dir), self.stage) if self.costs else nullcontext({}) as cost,
            progress(self.total, begun, self.stage, self.unit) as bar,
        ):
            run = _Run(self, journal, cost, bar)
            try:
                run.go()
            finally:
                run.close()

    def left(self, journal: Journal) -> Iterator[tuple[int, Item]]:
        """Items that are not finished, with the steps that they had."""
        for number, opens in self.items():
            if number not in journal.done:
                item = opens()
                if steps := journal.steps.pop(number, None):
                    item.restore([journal.read(place) for place in steps])
                yield number, item

    def _order(self, journal: Journal) -> None:
        """The finished items' rows in order, as one file, by rename."""
        parts = _Ordered(journal)
        if self.write:
            self.write(parts)
            return
        with ArtefactWriter(self.path, self.header) as writer:
            for lines, count in parts:
                writer.write_text(lines, count)
            writer.finish()


class _Ordered:
    """(lines, how many) of a journal's finished items in their order, read when they are asked for."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        for number in sorted(self._journal.done):
            place = self._journal.done[number]
            yield self._journal.read(place), place.rows


class _Run:
    """One process's part of a map: the items that are open, and the executor once there is a task for it."""

    def __init__(self, of: Map, journal: Journal, cost: dict[str, Any], bar: Any):
        self.of, self.journal, self.cost, self.bar = of, journal, cost, bar
        bar.shown = of.tally.shown
        self.open: dict[int, Item] = {}
        self.ready: deque[tuple[int, Any]] = deque()
        self.executor: Executor | None = None
        self.left = (of.total or 0) - sum(place.size for place in journal.done.values())

    def go(self) -> None:
        """Do all that is left. An item that waits for a long result holds up nothing but itself."""
        left, more = self.of.left(self.journal), True
        while more or self.open:
            if more and not self.ready and self._room():
                entry = next(left, None)
                if entry is None:
                    more = False
                else:
                    self._advance(*entry)
            elif self.ready and self._room():
                if self.executor is None:
                    self.of.before(self.left)
                    self.executor = make_executor(self.of.recipe, self.of.make_worker)
                self.executor.submit(*self.ready.popleft())
                self._take(block=False)  # workers need not wait for this process
            else:
                self._take(block=True)

    def _room(self) -> bool:
        return self.executor is None or self.executor.room()

    def _take(self, block: bool) -> None:
        """Take in one result, where there is one."""
        if self.executor is None or (found := self.executor.wait(block)) is None:
            return
        number, result = found
        item = self.open.pop(number)
        if step := item.take(result):
            self.journal.step(number, step)
        self._advance(number, item)
        self.cost.update(self.of.tally.cost())

    def _advance(self, number: int, item: Item) -> None:
        """The item's next task into the queue, or its rows into the journal."""
        task = item.ask()
        if task is not None:
            self.open[number] = item
            self.ready.append((number, task))
            return
        rows, tally = item.rows(), self.of.tally
        tally.judged += item.size
        if self.of.budget_field:
            tally.check(str(self.journal.path), self.of.budget_field, self.of.max_failure_share, self.of.total or 0)
        self.journal.finish(number, b"".join(rows), len(rows), item.size)
        self.bar.update(item.size)

    def close(self) -> None:
        """End the workers."""
        self.cost.update(self.of.tally.cost())
        if self.executor is not None:
            self.executor.close()


def make_way(path: Path, header: Header) -> None:
    """Remove a finished artefact of other settings: of a stage that is cheaper to run again than its outcome is to keep."""
    if path.exists() and read_header(path, header.stage) != header:
        path.unlink()


def make_executor(recipe: Recipe, make_worker: Callable[[], Worker]) -> Executor:
    """The executor that the recipe names. `make_worker` is called where the worker runs; elsewhere than here it is pickled."""
    if recipe.executor == "here":
        return Here(make_worker())
    make = partial(_made_elsewhere, recipe.num_threads, make_worker)
    if recipe.executor == "processes":
        return Processes(make, recipe.workers)
    from nemo_pivotrl.backends.ray_actors import RayActors

    return RayActors(make, recipe)


def _made_elsewhere(num_threads: int, make_worker: Callable[[], Worker]) -> Worker:
    """The worker, computing with as many threads as this process would: the number decides the last bits."""
    worker = make_worker()
    if num_threads and (torch := sys.modules.get("torch")):
        torch.set_num_threads(num_threads)
    return worker


# ---- items of one task ----


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker makes of a task that is all of its item."""

    lines: list[bytes]
    spent: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Further figures for the cost log, by name and what they are of."""


def found_rows(rows: Iterable[Mapping[str, Any]], **spent: int) -> Found:
    """Rows, and what they cost."""
    return Found([json_line(row) for row in rows], spent)


class Once:
    """An item of one task, whose result is its rows."""

    def __init__(self, task: Any, size: int, tally: Tally):
        self.task, self.size, self.tally = task, size, tally
        self._lines: list[bytes] | None = None

    def ask(self) -> Any | None:
        """See `Item`."""
        return self.task if self._lines is None else None

    def take(self, result: Found) -> bytes:
        """See `Item`."""
        self._lines, self.task = result.lines, None
        self.tally.spent.update(result.spent)
        self.tally.failed.update(result.failed)
        for name, figures in result.notes.items():
            self.tally.notes.setdefault(name, {}).update(figures)
        return b""

    def restore(self, steps: Sequence[bytes]) -> None:
        """See `Item`: it has no steps."""

    def rows(self) -> list[bytes]:
        """See `Item`."""
        return self._lines or []


def batches_of(rows: Iterable[Any], size: int, tally: Tally) -> Iterator[tuple[int, Callable[[], Item]]]:
    """Items of `size` consecutive rows, each a task as a list."""
    rest, number = iter(rows), 0
    while chunk := list(islice(rest, size)):
        yield number, partial(Once, chunk, len(chunk), tally)
        number += len(chunk)
