"""A stage on many ranks: rank 0 runs it as if it were alone, and every verb that it calls is executed by all ranks.

`run_together` starts this on each rank. What rank 0 gets from `load` stands for a model that is spread over the ranks: a
verb is announced in the store, sent to the others with its arguments, executed everywhere, and rank 0's result is what
the stage sees. The others wait for a key of the store and in no collective, so rank 0 may be busy elsewhere (judging, reading) for as
long as it likes: only time inside a verb counts as possibly hanging. Alone in a process there is nobody to send to.

What a verb raises on all ranks alike (InputError, OSError) reaches the stage, as with one process. Anything else, and what
only some ranks raise, ends the job with one error.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nemo_pivotrl.backends import launch
from nemo_pivotrl.backends.identity import without_start
from nemo_pivotrl.backends.launch import Patience, Place, Watchdog, place_of
from nemo_pivotrl.backends.vllm.colocated import load_colocated, shut_down_engines
from nemo_pivotrl.config import Megatron, Policy
from nemo_pivotrl.core.errors import InputError, Problem

ALIKE_S = 20.0
"""How long a rank that refuses a verb waits for the others to refuse it, too."""
FOREVER = timedelta(days=365)
_ranks: RankGroup | None = None


def run_together(stage: Callable[[], None], megatron: Megatron, place: Place, patience: Patience | None = None) -> int:
    """Run a stage on rank 0, whose calls the other ranks execute; the exit code of this rank.

    Raises on rank 0 what the stage raised as InputError or OSError, after all others have left. All else ends the process.
    """
    limit = 60.0 * megatron.distributed_timeout_minutes
    if _backend(megatron) == "nccl":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    if place.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        warnings.simplefilter("ignore")  # rank 0 has the same ones
    outcome: list[Any] = [None, 0]

    def program(watch: Watchdog | None) -> None:
        global _ranks
        _ranks = ranks = RankGroup(place, watch)
        ranks.rest()
        if place.rank > 0:
            outcome[1] = ranks.follow()
            return
        try:
            stage()
        except (InputError, OSError) as error:
            outcome[:] = [error, launch.BAD_INPUT]
        except SystemExit as leaving:  # a run that stopped at its deadline: all ranks leave with its code
            outcome[1] = leaving.code
        ranks.call("stop", 0, (outcome[1],))

    launch.run(program, _backend(megatron), place, patience or Patience(collective=limit, stuck=limit))
    if outcome[0] is not None:
        raise outcome[0]
    if outcome[1]:
        time.sleep(launch.SPEAK_S)
    return int(outcome[1])


def load(kind: str, policy: Policy, megatron: Megatron, *rest: Any) -> Any:
    """A model on all ranks: `policy` (rest: value_head, reference) or `engine`, which only samples (rest: the vllm section).

    Raises InputError for what the model, the recipe and the machine do not have in common, and on many ranks that were
    not started through `run_together`.
    """
    global _ranks
    if _ranks is None:
        place = place_of(os.environ)
        if place.world > 1:
            remedy = "start the stage itself on them: torchrun -m nemo_pivotrl.cli STAGE RECIPE, or srun nemo-pivotrl"
            raise InputError(Problem("environment", None, "processes", f"{place.world} of them", remedy))
        _ranks = RankGroup(place, None)
    return _ranks.load(kind, policy, megatron, *rest)


class RankGroup:
    """The ranks of a job, as one of them sees it."""

    def __init__(self, place: Place, watch: Watchdog | None):
        self.place, self.watch = place, watch
        self.number = 0
        self.models: dict[int, Any] = {}
        self.let_go: list[int] = []
        """Models that the stage no longer holds. They go with the next call: the group may be in the middle of one."""
        self.groups: Any = None
        self.layout: Megatron | None = None

    # ---- rank 0 ----

    def load(self, kind: str, policy: Policy, megatron: Megatron, *rest: Any) -> RemoteModel:
        """Load a model of `kind` on all ranks (see `_made`). Rank 0 alone calls it."""
        number = self.number + 1
        made = self.call("load", number, (kind, policy, megatron, *rest))
        handle = RemoteModel(self, number, type(made))
        weakref.finalize(handle, self.let_go.append, number).atexit = False
        return handle

    def call(self, verb: str, model: int, arguments: tuple[Any, ...]) -> Any:
        """Have all ranks do something; this rank's result. Raises TypeError for arguments that cannot be sent."""
        doomed = list(self.let_go)
        command = (verb, model, arguments, doomed)
        box = [None if self.watch is None else _sendable(verb, command)]  # before the others expect anything
        self.number += 1
        del self.let_go[: len(doomed)]
        if self.watch is not None:
            self.watch.store.set(f"call/{self.number}", verb)
            dist.broadcast_object_list(box, 0, device=self._device())
        return self._do(*command)

    # ---- the others ----

    def follow(self) -> int:
        """Execute the calls of rank 0 until it sends stop; the exit code that it sent."""
        assert self.watch is not None, "alone there is nobody to follow"
        while True:
            self.number += 1
            self.watch.store.wait([f"call/{self.number}"], FOREVER)
            box: list[Any] = [None]
            dist.broadcast_object_list(box, 0, device=self._device())
            verb, model, arguments, doomed = pickle.loads(box[0])
            try:
                done = self._do(verb, model, arguments, doomed)
            except (InputError, OSError):
                continue  # rank 0 has the same error, and decides
            if verb == "stop":
                return int(done)

    # ---- all ----

    def _do(self, verb: str, model: int, arguments: tuple[Any, ...], doomed: list[int]) -> Any:
        self.tick(verb if verb != "call" else str(arguments[0]))
        try:
            for number in doomed:
                self.models.pop(number, None)
            if doomed:
                gc.collect()  # modules and their hooks hold each other
            return self._execute(verb, model, arguments)
        except (InputError, OSError) as error:
            self._end_unless_alike(error)
            raise
        except Exception as error:  # a library's fault on one rank: the others wait in its collective
            if self.watch is None:
                raise
            launch.failed(self.watch, error)
        finally:
            self.rest()

    def _execute(self, verb: str, model: int, arguments: tuple[Any, ...]) -> Any:
        if verb == "load":
            self.models[model] = self._made(*arguments)
            return self.models[model]
        if verb == "call":
            name, positional, named = arguments
            return getattr(self.models[model], name)(*positional, **named)
        if verb == "set":
            return setattr(self.models[model], *arguments)
        self.models.clear()
        shut_down_engines()  # while the process groups that they stand in are still there
        return arguments[0]  # of stop: the exit code

    def _made(self, kind: str, policy: Policy, megatron: Megatron, *rest: Any) -> Any:
        groups = self._join(megatron)
        if kind == "engine":
            return load_colocated(policy, *rest, groups.world.size())
        # after `_join`, which replaces what a CPU lacks before megatron's model files are read
        from nemo_pivotrl.backends.megatron.train import MegatronPolicy

        made = MegatronPolicy(policy, megatron, groups, *rest)
        made.tick = self.tick
        return made

    def _join(self, megatron: Megatron) -> Any:
        """The process groups of a recipe's layout, made once."""
        megatron = without_start(megatron)  # whose weights they are is no matter of process groups
        if self.layout is None:
            from nemo_pivotrl.backends.megatron import parallel

            if self.watch is None and not dist.is_initialized():
                dist.init_process_group(_backend(megatron), store=dist.HashStore(), rank=0, world_size=1)
                atexit.register(parallel.leave)
            self.groups, self.layout = parallel.initialize(megatron, seed=0), megatron
        if megatron != self.layout:
            raise ValueError("all models of a process share one `megatron` section: its process groups are made once")
        return self.groups

    def _end_unless_alike(self, error: Exception) -> None:
        """Return when every rank refused the call; else end the job, for some of them wait in a collective."""
        if self.watch is None:
            return
        store, keys = self.watch.store, [f"refused/{self.number}/{rank}" for rank in range(self.place.world)]
        store.set(keys[self.place.rank], "1")
        deadline = time.monotonic() + ALIKE_S
        while not all(store.check([key]) for key in keys):
            if time.monotonic() > deadline:
                launch.failed(self.watch, error)
            time.sleep(0.02)

    def tick(self, doing: str) -> None:
        """Note progress for the watchdog."""
        if self.watch is not None:
            self.watch.tick(doing)

    def rest(self) -> None:
        """Note for the watchdog that this rank waits for the next call."""
        if self.watch is not None:
            self.watch.rest(self.number)

    def _device(self) -> torch.device | None:
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None


class RemoteModel:
    """A model that all ranks hold a part of. It has the model's verbs; what is set on it is set on every rank."""

    def __init__(self, ranks: RankGroup, number: int, kind: type):
        self.__dict__.update(_ranks=ranks, _number=number, _kind=kind)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not callable(getattr(self._kind, name, None)):
            raise AttributeError(f"{self._kind.__name__} on many ranks has no verb {name!r}")
        return partial(_call, self, name)

    @property
    def in_one_process(self) -> bool:
        return self._ranks.watch is None

    def __setattr__(self, name: str, value: Any) -> None:
        self._ranks.call("set", self._number, (name, value))


def _call(model: RemoteModel, name: str, *positional: Any, **named: Any) -> Any:
    """A verb of a model. It keeps a reference to the model, which must not be freed while the verb is called."""
    return model._ranks.call("call", model._number, (name, positional, named))


def _backend(megatron: Megatron) -> str:
    return "nccl" if torch.cuda.is_available() and not megatron.cpu else "gloo"


def _sendable(verb: str, command: Any) -> bytes:
    try:
        return pickle.dumps(command, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        what = command[2][0] if verb == "call" else verb
        raise TypeError(
            f"what is handed to {what} cannot be sent to the other ranks ({error}): a loss must be a function of a module, "
            "or a functools.partial of one"
        ) from error
