"""The map that stages work by: every row once, in order, whatever is killed, wherever it runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.processes import PATIENCE_S

from nemo_pivotrl.components import durable_map
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of, found_rows
from nemo_pivotrl.components.journal import Journal
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem

HEADER = Header("decoded", "a recipe")
ROWS = 103


class Doubling:
    """A worker: twice each number. It may end its process, once, at some row."""

    def __init__(self, dies_at: int = -1, once: str = ""):
        self.dies_at, self.once = dies_at, once

    def __call__(self, task: list[int]) -> Found:
        if self.dies_at in task and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found_rows(({"n": n, "twice": 2 * n} for n in task), numbers=len(task))


def bad_input() -> Doubling:
    raise InputError(Problem("model", None, "weights", "none", "give some"))


class Counting:
    """An item of several tasks: adds what a worker returns until it reaches its own number."""

    def __init__(self, number: int):
        self.number, self.size, self.sum, self.asked = number, 1, 0, 0

    def ask(self) -> tuple[int, int] | None:
        return (self.number, self.sum) if self.sum < self.number % 5 else None

    def take(self, result: int) -> bytes:
        self.sum += result
        return json.dumps(result).encode()

    def restore(self, steps: Sequence[bytes]) -> None:
        self.sum = sum(map(json.loads, steps))

    def rows(self) -> list[bytes]:
        return [json.dumps({"n": self.number, "sum": self.sum}).encode() + b"\n"]


def one(task: tuple[int, int]) -> int:
    return 1


def counting_items(count: int = ROWS) -> Iterator[tuple[int, Callable[[], Counting]]]:
    return ((n, partial(Counting, n)) for n in range(count))


def batches(folder: Path, make: Callable[[], Any] = Doubling, rows: int = ROWS, **settings: Any) -> Map:
    recipe, tally = Recipe(run_dir=str(folder), **settings), Tally()
    return Map(
        recipe, "double", folder / "d.jsonl", HEADER, lambda: batches_of(range(rows), 8, tally), make, rows, tally=tally
    )


def waves(folder: Path, make: Callable[[], Any] = lambda: one, **settings: Any) -> Map:
    return Map(Recipe(run_dir=str(folder), **settings), "count", folder / "d.jsonl", HEADER, counting_items, make, ROWS)


class Dead(BaseException):
    """What stands for kill -9."""


@pytest.mark.parametrize("kind", [batches, waves])
def test_cut_at_any_byte_it_goes_on_to_the_same_bytes(
    tmp_path: Path, kind: Callable[..., Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kind(tmp_path / "whole").run().read_bytes()
    assert [row["n"] for row in read_rows(tmp_path / "whole/d.jsonl")] == list(range(ROWS))

    def dead(*_: Any) -> None:
        raise Dead

    folder = tmp_path / "killed"
    journal = folder / "d.jsonl.journal"
    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(Map, "_order", dead)
        kind(folder).run()
    written, rng = journal.read_bytes(), random.Random(3)
    for cut in [0, 1, len(written) - 1, *(rng.randrange(len(written)) for _ in range(12))]:
        journal.write_bytes(written[:cut])
        calls: list[Any] = []

        def counted() -> Callable[[Any], Any]:
            worker = Doubling() if kind is batches else one
            return lambda task: (calls.append(task), worker(task))[1]  # type: ignore[operator]  # noqa: B023

        path = kind(folder, counted).run()
        assert path.read_bytes() == whole and not journal.exists()
        assert len(calls) <= ROWS * 2 * (1 - cut / len(written)) + 3, "what is there is not done again"
        path.unlink()


@pytest.mark.parametrize("kind", [batches, waves])
def test_killed_at_any_byte_and_once_more_it_goes_on_to_the_same_bytes(
    tmp_path: Path, kind: Callable[..., Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second process appends must not stand behind half a record of the first."""
    whole = kind(tmp_path / "whole").run().read_bytes()

    def dead(*_: Any) -> None:
        raise Dead

    def until_death() -> None:
        with monkeypatch.context() as patch, pytest.raises(Dead):
            patch.setattr(Map, "_order", dead)
            kind(tmp_path / "killed").run()

    until_death()
    journal, rng = tmp_path / "killed/d.jsonl.journal", random.Random(4)
    written = journal.read_bytes()
    for cut in [len(written) - 1, *(rng.randrange(200, len(written)) for _ in range(8))]:
        journal.write_bytes(written[:cut])
        until_death()
        path = kind(tmp_path / "killed").run()
        assert path.read_bytes() == whole
        path.unlink()


def test_results_out_of_order_are_put_in_order_and_a_straggler_holds_up_nothing(tmp_path: Path) -> None:
    released, seen = threading.Event(), []

    class Uneven:
        concurrency = 3

        def under_way(self) -> int:
            return 0

        def __call__(self, task: list[int]) -> Found:
            if 0 in task:
                released.wait(PATIENCE_S)
            seen.append(task[0])
            if len(seen) == 12:
                released.set()
            return found_rows({"n": n} for n in task)

    path = batches(tmp_path, Uneven).run()
    assert seen[-1] == 0 and [row["n"] for row in read_rows(path)] == list(range(ROWS))


def test_the_rest_of_a_task_runs_while_the_next_begins(tmp_path: Path) -> None:
    begun: list[int] = []

    def worker(task: list[int]) -> Callable[[], Found]:
        begun.append(task[0])

        def rest() -> Found:
            deadline = time.monotonic() + PATIENCE_S
            while task[0] == 0 and len(begun) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            return found_rows({"n": n, "others": len(begun) > 1} for n in task)

        return rest

    rows = list(read_rows(batches(tmp_path, lambda: worker).run()))
    assert rows[0]["others"] and [row["n"] for row in rows] == list(range(ROWS))


def test_processes_do_the_same_and_one_that_dies_loses_nothing(tmp_path: Path) -> None:
    whole = batches(tmp_path / "here").run().read_bytes()
    make = partial(Doubling, 40, str(tmp_path / "died"))
    assert batches(tmp_path / "there", make, executor="processes", workers=2).run().read_bytes() == whole
    assert (tmp_path / "died").exists()
    with pytest.raises(InputError, match="weights"):
        batches(tmp_path / "bad", bad_input, executor="processes").run()


def test_a_task_that_kills_its_workers_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_pivotrl.backends import executors

    monkeypatch.setattr(executors, "MAX_DEATHS", 2)
    with pytest.raises(InputError, match="2 workers died over the task at row 40"):
        batches(tmp_path, partial(Doubling, 40), executor="processes", rows=48).run()
    with contextlib.closing(Journal(tmp_path / "d.jsonl.journal", HEADER.to_line().encode())) as journal:
        assert len(journal.done) >= 4


def test_a_damaged_journal_and_anothers_are_refused(tmp_path: Path) -> None:
    path, belongs = tmp_path / "j", HEADER.to_line().encode()
    journal = Journal(path, belongs)
    journal.step(3, b"half")
    journal.finish(3, b'{"n":3}\n', 1, 1)
    journal.finish(1, b'{"n":1}\n', 1, 1)
    journal.close()
    again = Journal(path, belongs)
    assert sorted(again.done) == [1, 3] and not again.steps and again.read(again.done[3]) == b'{"n":3}\n'
    again.close()
    with pytest.raises(InputError, match="config_hash='a recipe'"):
        Journal(path, Header("decoded", "another").to_line().encode())
    whole = path.read_bytes()
    for damaged in (whole.replace(b'"n":3', b'"n":4'), whole.replace(b"3 d 1 1", b"2 d 1 1"), whole + b"\n\n"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged from byte \d+ on(?s:.*)truncate -s"):
            Journal(path, belongs)


def test_failures_are_counted_and_stop_the_run_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_map, "JUDGED_BEFORE_STOPPING", 20)
    tally, done = Tally(), []

    def worker(task: list[int]) -> Found:
        done.append(task[0])
        return Found([b"{}\n"], failed={"judge_timeout": 2} if task[0] >= 40 else {})

    of = batches(tmp_path, lambda: worker)
    of = Map(of.recipe, "s", of.path, HEADER, lambda: batches_of(range(ROWS), 8, tally), of.make_worker, ROWS, tally=tally,
             max_failure_share=0.1, budget_field="profile.max_failure_share")  # fmt: skip
    with pytest.raises(InputError, match=r"max_failure_share(?s:.*)judge_timeout"):
        of.run()
    assert done[-1] < 80 and of.path.with_name("d.jsonl.journal").exists()


def test_what_is_in_flight_is_bounded(tmp_path: Path) -> None:
    """A million rows are never all in memory: rows are read as workers ask for them."""
    read, done = [0], [0]

    def rows() -> Iterator[int]:
        for n in range(4000):
            read[0] += 1
            assert read[0] - done[0] <= 8 * 6
            yield n

    def worker(task: list[int]) -> Found:
        done[0] += len(task)
        return found_rows({"n": n} for n in task)

    recipe, tally = Recipe(run_dir=str(tmp_path)), Tally()
    path = Map(recipe, "m", tmp_path / "m.jsonl", HEADER, lambda: batches_of(rows(), 8, tally), lambda: worker).run()
    assert sum(1 for _ in read_rows(path)) == 4000
