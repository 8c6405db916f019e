"""Kill -9 at random moments of a profile, again and again, and compare the bytes with those of an undisturbed run.

    python benchmarks/profile_kills.py --kills 50

Each run is a process of its own (forked, so that none of them spends seconds on imports) that gets SIGKILL after a random time; the
next one goes on where it was. When one ends before its time, its bytes are compared and everything begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.sft import warmup

TINY = (
    "num_threads=1 logger.tensorboard=false world.warmup_tasks=200 world.train_tasks=24 world.puzzle_warmup_tasks=400 "
    "world.hidden_size=48 world.layers=1 warmup.num_steps=90 warmup.copy_steps=0 profile.candidates_per_chunk=8"
)


def main() -> None:
    """Print how many kills it took and whether all bytes were equal. Exits with 1 when they were not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("recipes/pivotrl/tiny.yaml", [f"run_dir={folder}/run", *TINY.split()])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for stage in (make_world, extract, warmup):
                stage(recipe)
            start = time.perf_counter()
            whole = run_whole(recipe)
        straight = time.perf_counter() - start
        kills = whole_runs = 0
        while kills < options.kills:
            if killed(recipe, rng.uniform(0.0, straight)):
                kills += 1
                continue
            if digest(recipe.path("profiles.jsonl")) != whole:
                raise SystemExit(f"other bytes after {kills} kills")
            whole_runs += 1
            recipe.path("profiles.jsonl").unlink()
        if run_whole(recipe) != whole:
            raise SystemExit(f"other bytes after {kills} kills")
    print(
        f"{kills} kills at random moments of {straight:.1f} s; {whole_runs + 1} profiles were finished, all with the same bytes"
    )


def run_whole(recipe: Recipe) -> str:
    """Profile to the end, and the digest of what came out."""
    with contextlib.redirect_stdout(io.StringIO()):
        profile(recipe)
    return digest(recipe.path("profiles.jsonl"))


def killed(recipe: Recipe, after_s: float) -> bool:
    """Profile in a process that is killed after so many seconds; False when it had ended before."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            profile(recipe)
        os._exit(0)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
