"""Runs jobs in as many processes as a test asks for. For NeMo-Aligner's own environment: `make test-aligner`."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 240.0
Run = Callable[..., list[dict[str, Any]]]

sys.path.insert(0, str(HERE))
# the parent of all ranks finds `warm` by these, and computes in one thread
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
os.environ["OMP_NUM_THREADS"] = "1"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])

import rank as rank_module  # noqa: E402


def spawn(folder: Path, job: str, ranks: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank found. Raises AssertionError with the end of the first failing rank's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        (folder / f"out-{rank}.json").unlink(missing_ok=True)
        texts = {key: str(value) for key, value in place.items()}
        processes.append(FORKS.Process(target=rank_module.run, args=(job, str(folder), arguments, texts)))
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    for rank, code in enumerate(codes):
        if code != 0:  # None: it ran out of time
            lines = (folder / f"log-{rank}.txt").read_text(errors="replace").splitlines()
            raise AssertionError(f"{job}: rank {rank} ended with {code}\n" + "\n".join(lines[-40:]))
    return [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer and pivots."""
    import tiny_aligner

    folder = tmp_path_factory.mktemp("inputs")
    tiny_aligner.write_inputs(folder)
    return folder


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> Run:
    """`run(job, ranks, **arguments)` in a folder of the test's own."""
    for name in inputs.iterdir():
        (tmp_path / name.name).symlink_to(name)

    def runs(job: str, ranks: int = 1, **arguments: Any) -> list[dict[str, Any]]:
        return spawn(tmp_path, job, ranks, arguments)

    return runs
