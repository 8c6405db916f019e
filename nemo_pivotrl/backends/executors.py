"""Where the work of a map runs: in this process, in processes of this machine, or on Ray (`ray_actors.py`).

An executor makes workers, gives them tasks and hands back what they return, in whatever order it comes. It keeps nothing: what is
lost with a worker is given to another one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol

from nemo_pivotrl.core.errors import InputError, Problem

LOOK_S = 0.02
"""Seconds after which a full worker is asked again whether it has room: single answers of a task free it, too."""
MAX_DEATHS = 5
"""So many workers may die over one task before the map stops: more is the task's fault."""

Worker = Callable[[Any], Any]
"""Does a task. It may return a function: the rest of the work, which runs in another thread while the worker begins its next task.

`concurrency` of it, 1 unless it has one, is how many threads may call it at a time; with more than 1, `under_way()` says how much of
that is taken, and `close()` ends it.
"""


class Executor(Protocol):
    """Runs tasks."""

    def room(self) -> bool:
        """Whether another task would be begun now."""
        ...

    def submit(self, number: int, task: Any) -> None:
        """Begin a task, the only one of this number that is under way."""
        ...

    def wait(self, block: bool) -> tuple[int, Any] | None:
        """(number, result) of a task that has ended; None where none has, after a moment or, unless `block`, at once.

        Raises what the worker raised."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def whole(worker: Worker, task: Any) -> Any:
    """A task with the rest of its work."""
    found = worker(task)
    return found() if callable(found) else found


def in_order(executor: Executor, tasks: Iterable[Any]) -> Iterator[Any]:
    """What each task gives, in the tasks' order; as many are under way as the executor has room for. It is closed at the end."""
    left, ended, begun, given = enumerate(tasks), dict[int, Any](), 0, 0
    more = True
    try:
        while more or given < begun:
            entry = next(left, None) if more and executor.room() else None
            if entry is not None:
                executor.submit(*entry)
                begun += 1
            elif more and executor.room():
                more = False
                continue
            if found := executor.wait(block=entry is None):
                ended[found[0]] = found[1]
            while given in ended:
                yield ended.pop(given)
                given += 1
    finally:
        executor.close()


class Here:
    """One worker in this process. One that is for one thread alone is called by the map's own."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.concurrency = int(getattr(worker, "concurrency", 1))
        self._most = 2 if self.concurrency == 1 else self.concurrency
        self._pool = ThreadPoolExecutor(self._most)
        self._running = 0
        self._ended: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()

    def room(self) -> bool:
        """See `Executor`. While the rest of a task runs, the worker takes another."""
        if self._running >= self._most:
            return False
        return self.concurrency == 1 or self.worker.under_way() < self.concurrency  # type: ignore[attr-defined]

    def submit(self, number: int, task: Any) -> None:
        """See `Executor`."""
        self._running += 1
        if self.concurrency > 1:
            job = self._pool.submit(whole, self.worker, task)
        else:
            found = self.worker(task)
            if callable(found):
                job = self._pool.submit(found)
            else:
                job = Future()
                job.set_result(found)
        job.add_done_callback(partial(self._end, number))

    def _end(self, number: int, job: Future[Any]) -> None:
        self._ended.put((number, job))

    def wait(self, block: bool) -> tuple[int, Any] | None:
        """See `Executor`."""
        try:
            number, job = self._ended.get(block=block, timeout=LOOK_S)
        except queue.Empty:
            return None
        self._running -= 1
        return number, job.result()

    def close(self) -> None:
        """See `Executor`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if close := getattr(self.worker, "close", None):
            close()


class Deaths:
    """How often a worker died over a task."""

    def __init__(self) -> None:
        self._of: Counter[int] = Counter()

    def count(self, number: int, how: str) -> None:
        """Note one. Raises InputError when it is too often."""
        self._of[number] += 1
        if self._of[number] >= MAX_DEATHS:
            remedy = "see the worker's log for its end (memory, a driver, a signal); what was done is kept for the same command"
            found = f"{self._of[number]} workers died over the task at row {number} ({how})"
            raise InputError(Problem("workers", None, "task", found, remedy))


def made(make_worker: Callable[[], Worker]) -> Worker:
    """The worker, in a process of its own. What its making raises it raises at its first task: where a process ends while it
    begins, nobody is told why."""
    try:
        return make_worker()
    except Exception as error:
        return partial(_refuse, error)


_worker: Worker


def _begin(make_worker: Callable[[], Worker]) -> None:
    """In a new process: end with the one that started it, however that ends, and make the worker."""
    global _worker
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _worker = made(make_worker)


def _refuse(error: Exception, task: Any) -> None:
    raise error


def _work(task: Any) -> Any:
    return whole(_worker, task)


class Processes:
    """Workers in processes of this machine. When one dies, all are made anew and what was under way is begun again."""

    def __init__(self, make_worker: Callable[[], Worker], count: int):
        self._make, self._count = make_worker, count
        self._running: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[tuple[int, Future[Any], ProcessPoolExecutor]] = queue.SimpleQueue()
        self._deaths = Deaths()
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, multiprocessing.get_context("spawn"), _begin, (self._make,))

    def room(self) -> bool:
        """See `Executor`. Each process has a task that it can begin at once."""
        return len(self._running) < 2 * self._count

    def submit(self, number: int, task: Any) -> None:
        """See `Executor`."""
        self._running[number], pool = task, self._pool
        try:
            job = pool.submit(_work, task)
        except BrokenProcessPool as error:
            job = Future()
            job.set_exception(error)
        job.add_done_callback(lambda job: self._ended.put((number, job, pool)))

    def wait(self, block: bool) -> tuple[int, Any] | None:
        """See `Executor`."""
        try:
            number, job, pool = self._ended.get(block=block, timeout=LOOK_S)
        except queue.Empty:
            return None
        if isinstance(error := job.exception(), BrokenProcessPool):
            self._deaths.count(number, str(error))
            if pool is self._pool:
                self._pool = self._new()
            self.submit(number, self._running[number])
            return None
        del self._running[number]
        return number, job.result()

    def close(self) -> None:
        """See `Executor`."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
