"""Worker processes that stay: they import once and then run named functions in any number of ranks.

A job is `"module:function"` of a file in `tests/distributed`, with arguments that pickle; `Workers.run` returns what each rank
returned. Every job joins torch.distributed anew, on its own port. A rank that fails or hangs ends the job: the error shows that
rank's traceback and the end of what it printed, and the next job gets new processes.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

from support.processes import forks, own_folder
from support.threads import MOST, threads

TIMEOUT_S = 400.0  # a busy machine is no fault; a job that hangs is
SHOWN_LINES = 30


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class Workers:
    """Up to as many processes as the largest job asked for."""

    def __init__(self) -> None:
        self.logs = own_folder(self, "ranks-")
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, ranks: int, job: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> list[Any]:
        """The answers of `ranks` ranks, by rank. Raises RankFailed."""
        while len(self.processes) < ranks:
            self._start(len(self.processes))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = self.pipes[:ranks]
        for rank, pipe in enumerate(pipes):
            try:
                pipe.send((ranks, port, job, arguments))
            except BrokenPipeError:
                self._fail(f"{job}: rank {rank} died after the job before it", [rank])
        answers: dict[Connection, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < ranks:
            ready = wait([p for p in pipes if p not in answers], max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = [r for r, p in enumerate(pipes) if p not in answers]
                self._fail(f"{job}: ranks {silent} did not answer in {timeout_s:.0f} s", silent)
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    worked, answer = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._fail(f"{job}: rank {rank} died", [rank])
                if not worked:
                    self._fail(f"{job}: rank {rank} failed\n{answer}", [rank])
                answers[pipe] = answer  # type: ignore[index]
        return [answers[pipe] for pipe in pipes]

    def _start(self, rank: int) -> None:
        here, there = forks.Pipe()
        process = forks.Process(target=work, args=(rank, there, str(self.logs / f"{rank}.log")), daemon=True)
        process.start()
        there.close()
        self.processes.append(process)
        self.pipes.append(here)

    def _fail(self, message: str, ranks: list[int]) -> None:
        self.stop()  # the other ranks wait in a collective
        for rank in ranks:
            lines = (self.logs / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            message += f"\n---- rank {rank} printed ----\n" + "\n".join(lines[-SHOWN_LINES:])
        raise RankFailed(message)

    def stop(self) -> None:
        """End the processes. A later job starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _settled() -> int:
    """Threads of this process, once those of groups that nothing holds any more have ended."""
    gc.collect()
    end = time.monotonic() + 10.0
    while threads() > MOST and time.monotonic() < end:
        time.sleep(0.02)
    return threads()


def work(rank: int, pipe: Connection, log: str) -> None:
    """A worker's life."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1"}
    import torch

    from nemo_pivotrl.backends.megatron import parallel

    torch.set_num_threads(1)
    while True:
        try:
            ranks, port, job, arguments = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        module, _, function = job.partition(":")
        try:
            answer = True, getattr(importlib.import_module(module), function)(**arguments)
            held = _settled()
            assert held <= MOST, f"{held} threads while {job} held what it had made"
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
        if answer[0]:
            parallel.leave()
