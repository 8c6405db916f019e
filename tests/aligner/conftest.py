"""Runs jobs in as many processes as a test asks for. For NeMo-Aligner's own environment: `make test-aligner`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 240.0
Run = Callable[..., list[dict[str, Any]]]

sys.path.insert(0, str(HERE))


def spawn(folder: Path, job: str, ranks: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank found. Raises AssertionError with the end of the first failing rank's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
        (folder / f"out-{rank}.json").unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "jobs.py"), job, str(folder), json.dumps(arguments)]
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        with (folder / f"log-{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() or -1 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        if code:
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
