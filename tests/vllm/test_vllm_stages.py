"""The stages over vLLM: an engine in this process, and two real servers, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm_world import ROOT, SMALL, Process, recipe_at

from nemo_pivotrl.backends.vllm.servers import Servers
from nemo_pivotrl.config import Vllm
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.sft import warmup
from nemo_pivotrl.pivotrl.train import train


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with candidates and a start policy."""
    folder = tmp_path_factory.mktemp("world") / "run"
    recipe = recipe_at(folder)
    with torch.enable_grad():
        for stage in (make_world, extract, warmup):
            stage(recipe, True)
    return folder


@pytest.fixture(scope="module")
def servers(started: Path) -> Iterator[list[Process]]:
    """Two servers of the start policy, which take weights."""
    start = ["recipes/pivotrl/tiny.yaml", f"run_dir={started}", *SMALL, "--refit"]
    both = [Process(started / f"server-{i}.log", *start) for i in range(2)]
    try:
        for one in both:
            one.wait()
        yield both
    finally:
        for one in both:
            one.kill()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "pivotrl/metrics.jsonl").read_text().splitlines()]


def test_profile_and_train_through_the_engine(started: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(started, tmp_path / "run")
    recipe = recipe_at(folder, "loss_fn.max_sampler_mismatch=1e-4", "loss_fn.seq_logprob_error_threshold=2.0")
    profile(recipe)
    rows = list(read_rows(folder / "profiles.jsonl"))
    assert rows and not any(row["profile"]["failure"] for row in rows)
    assert {len(r["samples"]) for r in rows} <= {2, 3, 4} and any(len(r["samples"]) < 4 for r in rows), (
        "it is curtailed"
    )
    assert any(0 < row["pass_rate"] < 1 for row in rows)
    select_pivots(recipe)
    with torch.enable_grad():
        final = train(recipe)
    steps = metrics(folder)
    # the engine follows the weights: a stale one would be off by far more after a step at this learning rate
    assert len(steps) == 2 and all(step["sampler_mismatch"] < 1e-4 for step in steps)
    assert (final / "model.safetensors").exists() and any(step["grad_norm"] > 0 for step in steps)


def test_a_profile_over_two_servers_loses_nothing_when_one_is_killed(
    started: Path, servers: list[Process], tmp_path: Path
) -> None:
    addresses = f"vllm.servers=[{servers[0].url},{servers[1].url}]"
    folder = shutil.copytree(started, tmp_path / "run", ignore=shutil.ignore_patterns("*.log"))
    pool = Servers(recipe_at(folder).policy, Vllm(servers=(servers[0].url, servers[1].url)))
    assert [len(set(pool.refit(str(folder / "start/policy"))))] == [1]
    sequences = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14])]
    there = pool.log_probs(sequences)
    pool.close()

    recipe = recipe_at(folder, addresses, "vllm.backoff_s=0.05", "profile.candidates_per_chunk=4")
    journal = folder / "profiles.jsonl.journal"

    unfinished: list[bool] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 5_000):
            time.sleep(0.002)
        servers[1].kill()
        unfinished.append(journal.exists())

    killer = threading.Thread(target=kill)
    killer.start()
    profile(recipe)
    killer.join()
    assert unfinished == [True], "it died while the profile ran"
    assert read_header(folder / "profiles.jsonl", "profiles")
    rows = list(read_rows(folder / "profiles.jsonl"))
    candidates = list(read_rows(folder / "candidates.jsonl"))
    assert len(rows) == len(candidates) and not any(row["profile"]["failure"] for row in rows)
    assert all(row["samples"] and all(s["tokens"] > 0 for s in row["samples"]) for row in rows)

    # the one that is left serves training: refitted after every step, and the trainer agrees with it
    from nemo_pivotrl.backends import loading

    reference = loading.load_scorer(patient_of(recipe.policy.model_name))
    for ours, theirs in zip(reference.log_probs(sequences), there, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5
    recipe = recipe_at(folder, addresses, "vllm.backoff_s=0.05", "loss_fn.max_sampler_mismatch=1e-4")
    select_pivots(recipe)
    with torch.enable_grad():
        train(recipe)
    assert len(metrics(folder)) == 2 and all(step["failed"] == 0 for step in metrics(folder))


def patient_of(folder: str) -> object:
    from nemo_pivotrl.config import Patient

    return Patient(model_name=folder, device="cpu")


def test_an_engine_shares_its_ranks_with_megatron(started: Path, tmp_path: Path) -> None:
    """torchrun, two tensor-parallel ranks: each holds its part of the trainer and of the engine, which follows the trainer."""
    folder = shutil.copytree(started, tmp_path / "run", ignore=shutil.ignore_patterns("*.log"))
    recipe = recipe_at(folder)
    profile(recipe)
    select_pivots(recipe)
    recipe_file, torchrun = "recipes/pivotrl/tiny.yaml", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    spread = [
        "policy.backend=megatron",
        "megatron.tensor_model_parallel_size=2",
        "megatron.cpu=true",
        "megatron.bf16=false",
    ]
    gate = ["vllm.colocated=true", "loss_fn.max_sampler_mismatch=1e-4"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "nemo_pivotrl.cli", "train", recipe_file, f"run_dir={folder}"]
    done = subprocess.run(
        [*command, *SMALL, *spread, *gate],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps = metrics(folder)
    assert len(steps) == 2 and all(step["sampler_mismatch"] < 1e-4 for step in steps)
