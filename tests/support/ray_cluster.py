"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ray.cluster_utils import Cluster

TESTS = Path(__file__).resolve().parents[1]
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class TwoNodes:
    """A head and a second node. Workers and drivers import the package and the tests' support."""

    def __init__(self) -> None:
        self._before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{TESTS.parent}:{TESTS}"
        # a dead node is noticed in seconds instead of half a minute
        os.environ.update({"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"})
        self.cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self.second: Any = None
        self.add_second()

    def __enter__(self) -> TwoNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.shutdown()
        if self._before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = self._before

    def add_second(self) -> None:
        self.second = self.cluster.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"})

    def kill_second(self) -> None:
        """SIGKILL to the second node's raylet."""
        (raylet,) = self.second.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        self.cluster.remove_node(self.second, allow_graceful=False)

    def actors(self) -> list[int]:
        """Process ids of the maps' workers on both nodes."""
        nodes = {node.all_processes["raylet"][0].process.pid for node in self.cluster.list_all_nodes()}
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in nodes and (place / "cmdline").read_bytes().startswith(b"ray::Holder"):
                    found.append(int(place.name))
        return found

    def start(self, folder: Path, workers: int, items: int, seconds: float) -> subprocess.Popen[bytes]:
        words = ["-m", "support.ray_driver", str(folder), self.cluster.address, str(workers), str(items), str(seconds)]
        with (folder / "driver.log").open("ab") as log:
            return subprocess.Popen([sys.executable, *words], cwd=TESTS, stdout=log, stderr=log)
