"""A map on a real Ray cluster of two nodes: whatever is killed, the artefact has the bytes of one process.

Fifty kills of each kind are in benchmarks/ray_nodes.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import PATIENCE_S, wait_for
from support.ray_cluster import TwoNodes
from support.ray_driver import run

ITEMS = 40


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(str(tmp_path_factory.mktemp("whole")), "here", 1, ITEMS, 0.0).read_bytes()


def begun(folder: Path) -> bool:
    """Whether some results have come, and not all."""
    journal = folder / "decoded.jsonl.journal"
    return journal.exists() and journal.read_bytes().count(b" d ") > 4


def test_an_actor_a_node_and_the_driver_die_and_the_bytes_are_the_same(
    nodes: TwoNodes, whole: bytes, tmp_path: Path
) -> None:
    driver, held = nodes.start(tmp_path, 2, ITEMS, 0.1), tmp_path / "held"
    wait_for(lambda: begun(tmp_path), "the first results")
    held.touch()  # no run ends before Ray has started an actor again, which takes a busy machine longer than all items do
    os.kill(int(next((tmp_path / "workers").iterdir()).name), signal.SIGKILL)
    wait_for(lambda: len(list((tmp_path / "workers").iterdir())) == 3, "another actor")
    nodes.kill_second()  # the raylet of a node, and with it what runs there
    journal = tmp_path / "decoded.jsonl.journal"
    size = journal.stat().st_size
    held.unlink()
    wait_for(lambda: not journal.exists() or journal.stat().st_size > size + 200, "more results")
    driver.kill()
    driver.wait()
    killed = journal.exists()
    nodes.add_second()
    again = nodes.start(tmp_path, 2, ITEMS, 0.0)
    assert again.wait(PATIENCE_S) == 0
    assert killed and (tmp_path / "decoded.jsonl").read_bytes() == whole
