"""A map on Ray as a process of its own: items of several tasks, each of which sleeps as if it sampled.
While there is a file FOLDER/held, no task ends.

    python -m support.ray_driver FOLDER ADDRESS WORKERS ITEMS SECONDS

With `here` as the address it runs in this process. Each worker leaves a file named by its process id in FOLDER/workers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_pivotrl.components.durable_map import Map
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.run import Ray
from nemo_pivotrl.core.artifacts import Header


class Waves:
    """An item of one to three tasks; what it asks next depends on what it has."""

    size = 1

    def __init__(self, number: int):
        self.number, self.found = number, list[int]()

    def ask(self) -> tuple[int, int] | None:
        return (self.number, len(self.found)) if len(self.found) <= self.number % 3 else None

    def take(self, result: int) -> bytes:
        self.found.append(result)
        return json.dumps(result).encode()

    def restore(self, steps: Sequence[bytes]) -> None:
        self.found = [json.loads(step) for step in steps]

    def rows(self) -> list[bytes]:
        return [json.dumps({"id": str(self.number), "sample": 0, "found": self.found}).encode() + b"\n"]


class Sleeping:
    """A worker whose result depends on its task alone."""

    def __init__(self, folder: str, seconds: float):
        self.seconds, self.held = seconds, Path(folder, "held")
        place = Path(folder, "workers")
        place.mkdir(parents=True, exist_ok=True)
        (place / str(os.getpid())).touch()

    def __call__(self, task: tuple[int, int]) -> int:
        time.sleep(self.seconds)
        while self.held.exists():
            time.sleep(0.01)
        return 1000 * task[0] + task[1]


def items(count: int) -> Iterator[tuple[int, Callable[[], Waves]]]:
    return ((n, partial(Waves, n)) for n in range(count))


def run(folder: str, address: str, workers: int, count: int, seconds: float) -> Path:
    executor = "here" if address == "here" else "ray"
    recipe = Recipe(run_dir=folder, executor=executor, workers=workers, ray=Ray(address=address))
    make, path = partial(Sleeping, folder, seconds), recipe.path("decoded.jsonl")
    return Map(recipe, "decode", path, Header("decoded", "waves"), partial(items, count), make, count).run()


if __name__ == "__main__":
    folder, address, *numbers = sys.argv[1:]
    run(folder, address, int(numbers[0]), int(numbers[1]), float(numbers[2]))
