"""What each process of test_megatron_launch.py runs: `python launch_jobs.py KIND`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from nemo_pivotrl.backends.launch import Patience, Watchdog, place_of, run
from nemo_pivotrl.core.errors import InputError, Problem

PATIENCE = Patience(join=10.0, collective=60.0, beat=0.2, dead=2.0, stuck=4.0, leave=5.0)
kind, victim = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1


def program(watch: Watchdog | None) -> None:
    if watch is not None and kind in ("busy", "lost"):
        # longer than `stuck`: the stage's own work on rank 0, which the others await at rest
        watch.rest(0)
        if kind == "lost" and dist.get_rank() == victim:
            watch.tick("infer")
        time.sleep(7 if kind == "busy" else 60)
    for step in range(3):
        if watch is not None:
            watch.tick(f"step {step}")
        if step == 1 and dist.get_rank() == victim:
            if kind == "raise":
                raise ZeroDivisionError("of all things")
            if kind == "input":
                raise InputError(Problem("recipe", None, "seed", "-1", "use another"))
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                time.sleep(60)
        if watch is not None and step == 1:
            watch.tick("all_reduce")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert float(total) == dist.get_world_size()
    if kind == "late" and dist.get_rank() == victim:
        time.sleep(1)
        raise ValueError("after the others were done")
    print(f"rank {dist.get_rank()} is done")


if __name__ == "__main__":
    sys.exit(run(program, "gloo", place_of(os.environ), PATIENCE))
