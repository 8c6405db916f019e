"""The demo's tasks as simulators: `nemo_pivotrl.demo.simulators:service_desk` and `:puzzles`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.demo.service_desk import MAX_TURNS, Episode, Task, desk_task, puzzle_task, tasks


@dataclass(frozen=True, slots=True)
class ServiceDesk:
    """Episodes of the service desk (`demo/service_desk.py`) on the tasks of one split."""

    seed: int
    sizes: dict[str, int]
    """Split -> number of tasks."""
    make: Callable[[Random, str], Task] = desk_task
    split: str = "test"
    max_turns: int = MAX_TURNS

    def tasks(self) -> Sequence[Task]:
        return tasks(self.seed, self.sizes, self.make)[self.split]

    def start(self, task: Task) -> Episode:
        return Episode(task)


def service_desk(recipe: Recipe, split: str = "test") -> ServiceDesk:
    """Customers with one request each, tools and a database."""
    world = recipe.world
    sizes = {"warmup": world.warmup_tasks, "train": world.train_tasks, "test": world.test_tasks}
    return ServiceDesk(recipe.seed, sizes, split=split)


def puzzles(recipe: Recipe, split: str = "test") -> ServiceDesk:
    """Short text puzzles without tools: they have nothing to do with the desk."""
    sizes = {"warmup": recipe.world.puzzle_warmup_tasks, "test": recipe.world.puzzle_test_tasks}
    return ServiceDesk(recipe.seed, sizes, puzzle_task, split)
