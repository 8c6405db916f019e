"""The embedded world with a model that vLLM's CPU attention takes, and servers of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "num_threads=1",
    "world.warmup_tasks=60",
    "world.train_tasks=12",
    "world.test_tasks=4",
    "world.puzzle_warmup_tasks=100",
    "world.puzzle_test_tasks=4",
    "world.hidden_size=64",
    "world.heads=2",
    "world.layers=1",
    "warmup.num_steps=60",
    "warmup.copy_steps=0",
    "profile.num_generations=4",
    "profile.candidates_per_chunk=8",
    "profile.min_wave=2",
    "select.rule=mixed",
    "select.lambda_diff=1.0",
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.max_num_steps=2",
    "grpo.val_period=0",
    "policy.sampler=vllm",
    "vllm.kv_cache_gib=0.06",
    "vllm.max_num_seqs=64",
]


def recipe_at(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe at `folder`, sampled by vLLM."""
    return load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), [f"run_dir={folder}", *SMALL, *overrides])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A `nemo-pivotrl serve` of its own."""

    def __init__(self, log: Path, *arguments: str):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "nemo_pivotrl.cli", "serve", *arguments, "--port", str(self.port)]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=1).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
                time.sleep(0.2)
        raise AssertionError(f"not healthy in {seconds} s:\n{self.log.read_text(errors='replace')[-4000:]}")

    def kill(self) -> None:
        """The server and its engine, at once, as a machine that goes down."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
