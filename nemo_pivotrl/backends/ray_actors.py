"""Workers as actors on Ray: each holds an engine or a client of servers, on whatever node has room for it.

Ray restarts an actor that dies; what it was at work on is given to whichever actor is free. The process that runs the stage is the
driver: it alone writes, and when it ends, Ray ends its actors.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from nemo_pivotrl.backends.base import extra_of
from nemo_pivotrl.backends.executors import LOOK_S, Deaths, Worker, made, whole
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem

with extra_of("executor", "ray"):
    import ray
    import ray.exceptions

AHEAD = 2
"""Tasks that an actor has: one at work, and one whose rest is done meanwhile, or that waits."""


class Holder:
    """What runs in an actor: the worker, made when the actor is, and again when it is restarted."""

    def __init__(self, make_worker: Callable[[], Worker]):
        self.worker = made(make_worker)
        self.alone = int(getattr(self.worker, "concurrency", 1)) == 1
        self.turn = threading.Lock()

    def work(self, task: Any) -> Any:
        """A task with its rest. A worker that is for one thread alone begins one task at a time."""
        if not self.alone:
            return whole(self.worker, task)
        with self.turn:
            found = self.worker(task)
        return found() if callable(found) else found

    def ready(self) -> None:
        """Comes back when the actor has started again."""


def _alone(address: str) -> dict[str, Any]:
    """A cluster that the stage starts for itself has no dashboard and reports its use to nobody.

    Ray listens on all of the machine's addresses; whoever asks it for something needs the token that it makes (Ray 2.60).
    """
    if address or os.environ.get("RAY_ADDRESS"):
        return {}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return {"include_dashboard": False}


class RayActors:
    """`recipe.workers` actors. An item's next task goes to the actor that had the last one, where that has room."""

    def __init__(self, make_worker: Callable[[], Worker], recipe: Recipe):
        settings = recipe.ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(
                    settings.address or None, log_to_driver=False, logging_level="warning", **_alone(settings.address)
                )
            except ConnectionError as error:
                found = settings.address or os.environ.get("RAY_ADDRESS", "")
                remedy = "start it (ray start --head), give its address, or leave this empty for a cluster of this machine alone"
                raise InputError(Problem("recipe", None, "ray.address", found, remedy)) from error
        actor = ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=-1,
            max_concurrency=AHEAD,
            scheduling_strategy="SPREAD" if settings.placement == "SPREAD" else "DEFAULT",
        )(Holder)
        self._actors = [actor.remote(make_worker) for _ in range(recipe.workers)]
        self._tasks: dict[Any, tuple[int, int, Any]] = {}
        """Reference to a result that is to come -> (number, actor, task)."""
        self._restarting: dict[Any, int] = {}
        """Reference that comes when an actor has started again -> actor."""
        self._lost: list[tuple[int, Any]] = []
        self._last: dict[int, int] = {}
        self._deaths = Deaths()

    def _free(self) -> list[int]:
        """The actors that take a task, the idlest first."""
        busy = Counter(actor for _, actor, _ in self._tasks.values())
        down = set(self._restarting.values())
        found = [n for n in range(len(self._actors)) if n not in down and busy[n] < AHEAD]
        return sorted(found, key=lambda n: busy[n])

    def room(self) -> bool:
        """See `Executor`. What was lost goes first."""
        return not self._lost and bool(self._free())

    def submit(self, number: int, task: Any) -> None:
        """See `Executor`."""
        free, last = self._free(), self._last.get(number, -1)
        self._last[number] = chosen = last if last in free else free[0]
        self._tasks[self._actors[chosen].work.remote(task)] = number, chosen, task

    def wait(self, block: bool) -> tuple[int, Any] | None:
        """See `Executor`."""
        while self._lost and self._free():
            self.submit(*self._lost.pop())
        if not self._tasks and not self._restarting:
            return None
        ended, _ = ray.wait([*self._tasks, *self._restarting], timeout=LOOK_S if block else 0)
        if not ended:
            return None
        if ended[0] in self._restarting:
            del self._restarting[ended[0]]
            return None
        number, actor, task = self._tasks.pop(ended[0])
        try:
            return number, ray.get(ended[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            self._deaths.count(number, type(error).__name__)
            self._lost.append((number, task))
            if actor not in self._restarting.values():
                self._restarting[self._actors[actor].ready.options(max_task_retries=-1).remote()] = actor
            return None

    def close(self) -> None:
        """See `Executor`."""
        for actor in self._actors:
            ray.kill(actor)
        if self._own:
            ray.shutdown()
