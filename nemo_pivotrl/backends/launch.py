"""Many processes that start together, find each other, and end together with one readable error.

torchrun and Slurm's `srun` start the processes; `place_of` reads which one this is. `run` then joins them, calls the
program, and watches: each rank shows signs of life in a store, and whoever first sees that a rank raised, died or hangs
writes why. That rank prints it, all ranks end with a code that is not 0, and nobody waits half an hour in a collective.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from nemo_pivotrl.core.errors import InputError, Problem

BAD_INPUT, FAILED = 2, 1
SYMPTOM = re.compile(r"gloo|nccl|connection|timed out|socket|peer|store", re.IGNORECASE)
"""What a rank's error says when it is most likely another rank that failed."""
SPEAK_S = 2.0
"""How much longer than rank 0 the other ranks stay, when all end with an error that rank 0 tells: torchrun ends every rank as
soon as one has failed."""
RESTING = ""
"""What a rank does that cannot hang the others."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of how many this is."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    agent_store: bool = False
    """torchrun's agent already serves a store at that address."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    join: float = 600.0
    """For all processes to arrive."""
    collective: float = 1800.0
    beat: float = 5.0
    """Between signs of life."""
    dead: float = 60.0
    """Without a sign of life, after which a rank counts as dead."""
    stuck: float = 1800.0
    """Without progress (`Watch.tick`) on any rank, after which the job counts as hanging, unless all ranks rest."""
    leave: float = 15.0
    """That rank 0, which serves the store, waits for the others to read why the job ends."""


def place_of(environment: Mapping[str, str]) -> Place:
    """This process's place by torchrun's variables, else by `srun`'s, else alone. Raises InputError for half of them."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if missing:
            remedy = f"set {', '.join(missing)} too, or start with torchrun or srun"
            raise InputError(Problem("environment", None, "RANK, WORLD_SIZE", "a part of torchrun's variables", remedy))
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
        rank, world, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = int(environment.get("LOCAL_RANK", rank))
        return Place(rank, world, local, environment["MASTER_ADDR"], port, agent)
    # a batch script has most of Slurm's variables, too, but is one process: only a step started by srun has this one
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = environment.get("MASTER_ADDR") or first_host(nodes)
        # one port per job, so that two jobs on a node do not meet
        port = int(environment.get("MASTER_PORT") or 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
        return Place(int(environment["SLURM_PROCID"]), world, int(environment["SLURM_LOCALID"]), address, port)
    return Place(0, 1, 0, "127.0.0.1", 0)


def first_host(nodes: str) -> str:
    """First host of a Slurm node list such as `gpu[003-006,009],login1` or `r[1-2]n[01-04]`. Raises InputError."""
    depth, end = 0, len(nodes)
    for i, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = i
            break
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[:end])
    if not host or not re.fullmatch(r"[\w.-]+", host):
        remedy = "set MASTER_ADDR to the first node's name"
        raise InputError(Problem("environment", None, "SLURM_JOB_NODELIST", nodes or "nothing", remedy))
    return host


def as_torchrun(place: Place) -> dict[str, str]:
    """torchrun's variables for a place, which is what libraries read."""
    numbers = {"RANK": place.rank, "WORLD_SIZE": place.world, "LOCAL_RANK": place.local_rank, "MASTER_PORT": place.port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": place.address}


class Watchdog:
    """Signs of life of all ranks, and the first reason to end."""

    def __init__(self, place: Place, patience: Patience):
        self.place, self.patience = place, patience
        self.ticks, self.doing = 0, "start"
        self._progress: dict[int, list[str]] = {}
        self._moved = time.monotonic()
        self.finished = threading.Event()
        self.store = _store(place, patience, server=place.rank == 0 and not place.agent_store)
        # a connection of its own: a client that waits for a key lets nobody else speak
        self.own = _store(place, patience, server=False)
        self.thread = threading.Thread(target=self._look, daemon=True)

    def tick(self, doing: str) -> None:
        """Count one step of progress. The watchdog blames the rank with the fewest steps for a hang."""
        self.ticks, self.doing = self.ticks + 1, doing

    def rest(self, orders: int) -> None:
        """Note that this rank has nothing to do for the others. Ranks that have done equally many `orders` are equally far,
        however many ticks each of them took."""
        self.ticks, self.doing = orders << 32, RESTING

    def roll_call(self) -> None:
        """Wait for all ranks. Raises TimeoutError with those that did not come."""
        self.store.set(f"here/{self.place.rank}", os.uname().nodename)
        deadline = time.monotonic() + self.patience.join
        missing = list(range(self.place.world))
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
            if missing and time.monotonic() > deadline:
                raise TimeoutError(f"{_ranks(missing)} did not arrive in {self.patience.join:.0f} s")
            time.sleep(0.05 if missing else 0.0)

    def fail(self, reason: str) -> bool:
        """Make `reason` the reason to end and print it, unless there is one already. Whether it is."""
        mine = f"{self.place.rank}: {reason}"  # several ranks may come to the same words
        won = bool(self.own.compare_set("error", "", mine).decode() == mine)
        if won:
            _say(reason)
        return won

    def _look(self) -> None:
        """The watching thread: send heart-beats, read those of the other ranks, end this process when there is a reason."""
        seen: dict[int, tuple[str, float]] = {}
        while not self.finished.wait(self.patience.beat):
            try:
                self._beat_and_judge(seen)
            except RuntimeError:
                if not self.finished.is_set():  # the store's host is gone; one of the others says so
                    _end("rank 0 died: its store does not answer" if self.place.rank == 1 else "", FAILED)

    def _beat_and_judge(self, seen: dict[int, tuple[str, float]]) -> None:
        place, now = self.place, time.monotonic()
        self.own.set(f"beat/{place.rank}", f"{now} {self.ticks} {self.doing}")
        if self.own.check(["error"]):
            self._let_others_read()
            _end("", FAILED)
        for rank in range(place.world):
            text = "0 0 start"  # one that dies before its first sign of life counts from here
            if self.own.check([f"done/{rank}"]):
                text = "done"
            elif self.own.check([f"beat/{rank}"]):
                text = self.own.get(f"beat/{rank}").decode()
            if rank not in seen or seen[rank][0] != text:
                seen[rank] = (text, now)
        alive = {rank: (text, since) for rank, (text, since) in seen.items() if text != "done"}
        dead = [rank for rank, (_, since) in alive.items() if now - since > self.patience.dead]
        if dead:
            self._give_up(f"{_ranks(dead)} died: no sign of life for {self.patience.dead:.0f} s")
        self._judge_progress({rank: text.split(" ", 2)[1:] for rank, (text, _) in alive.items()}, now)

    def _judge_progress(self, progress: dict[int, list[str]], now: float) -> None:
        """If no rank has made progress for too long, blame the working ranks with the fewest steps."""
        working = {rank: (int(ticks), doing) for rank, (ticks, doing) in progress.items() if doing != RESTING}
        if progress != self._progress or not working:
            self._progress, self._moved = progress, now
        elif now - self._moved > self.patience.stuck:
            least = min(ticks for ticks, _ in working.values())
            slow = [rank for rank, (ticks, _) in working.items() if ticks == least]
            where = working[slow[0]][1]
            others = "the others wait for it" if len(slow) < len(progress) else "all ranks are there"
            self._give_up(f"{_ranks(slow)} hangs in '{where}': no progress for {self.patience.stuck:.0f} s, {others}")

    def _give_up(self, reason: str) -> None:
        self.fail(reason)
        self._let_others_read()
        _end("", FAILED)

    def _let_others_read(self) -> None:
        """Rank 0 serves the store: it ends last, or when `patience.leave` is over."""
        self.own.set(f"left/{self.place.rank}", "1")
        deadline = time.monotonic() + self.patience.leave
        keys = [f"left/{rank}" for rank in range(self.place.world)]
        while self.place.rank == 0 and time.monotonic() < deadline:
            if all(self.own.check([key]) for key in keys):
                return
            time.sleep(self.patience.beat / 10)


def run(program: Callable[[Watchdog | None], None], backend: str, place: Place, patience: Patience = Patience()) -> int:
    """Join the other processes, call `program`, and return this process's exit code; on failure it does not return.

    `program` is given the watch, to `tick`; None when this process is alone. InputError ends with code 2, all else with 1.
    """
    os.environ |= as_torchrun(place)
    if place.world == 1:
        program(None)
        return 0
    watch = Watchdog(place, patience)
    try:
        watch.roll_call()
        store = dist.PrefixStore("group", watch.store)
        timeout = timedelta(seconds=patience.collective)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
        watch.thread.start()
        program(watch)
        watch.store.set(f"done/{place.rank}", "1")
        if place.rank == 0:
            # the store's host goes last; a rank that fails meanwhile is found by the watch
            watch.store.wait([f"done/{rank}" for rank in range(place.world)], timedelta(days=365))
    except BaseException as error:  # the other ranks wait: whatever ends this one ends them, with its reason
        failed(watch, error)
    watch.finished.set()
    watch.thread.join(patience.leave)  # it may be asking the store
    if dist.is_initialized():  # a rollout engine in these processes takes the groups with it
        dist.destroy_process_group()
    return 0


def leave(code: int) -> NoReturn:
    """End this process after its last line of work, without the interpreter's teardown: a process group's threads, which live as
    long as anything of vLLM or megatron-core refers to the group, may abort in it and make a failure of a finished job."""
    atexit._run_exitfuncs()
    sys.stderr.flush()
    _end("", code)


def failed(watch: Watchdog, error: BaseException) -> NoReturn:
    """End the job with this rank's error as the reason, or with the reason that it is only a symptom of."""
    patience, rank = watch.patience, watch.place.rank
    if watch.thread.is_alive() and isinstance(error, RuntimeError) and SYMPTOM.search(str(error)):
        time.sleep(2 * patience.dead + 5 * patience.beat)  # the watch ends this process when it finds whose fault it is
    bad = isinstance(error, InputError)
    text = f"rank {rank} failed: {error if bad else f'{type(error).__name__}: {error}'}"
    frames = traceback.extract_tb(error.__traceback__)
    if not bad and frames:
        text += f"\n    at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
    watch.finished.set()  # the watch must not end this process before it has spoken
    try:
        watch.fail(text)
        watch._let_others_read()
    except RuntimeError:  # the store is gone: nobody else can say it
        _say(text)
    _end("", BAD_INPUT if bad else FAILED)


def _store(place: Place, patience: Patience, server: bool) -> dist.TCPStore:
    return dist.TCPStore(
        place.address,
        place.port,
        None,
        server,
        timedelta(seconds=patience.join),
        wait_for_workers=False,
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _end(text: str, code: int) -> NoReturn:
    """Leave at once: the main thread may wait in a collective that never ends."""
    if text:
        _say(text)
    sys.stdout.flush()
    os._exit(code)


def _say(text: str) -> None:
    print(f"nemo-pivotrl: {text}", file=sys.stderr, flush=True)
