"""The demo's tasks as simulators, by import path: `nemo_pivotrl.demo.simulators:service_desk`, `:validation` and `:puzzles`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.demo import request_desk
from nemo_pivotrl.demo.service_desk import MAX_TURNS, Episode, Task, desk_task, puzzle_task, tasks


@dataclass(frozen=True, slots=True)
class ServiceDesk:
    """Episodes of a desk, or of puzzles, on the tasks of one split."""

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


@dataclass(frozen=True, slots=True)
class RequestDesk:
    """Episodes of the request desk. Who trains sees `SEEN` families; the warm-up all of them; of the test half is `UNSEEN`."""

    seed: int
    sizes: dict[str, int]
    split: str = "test"
    max_turns: int = request_desk.RequestEpisode.max_turns

    def tasks(self) -> Sequence[Task]:
        size = self.sizes[self.split]
        parts = {"warmup": [(request_desk.FAMILIES, size)], "test": [(request_desk.SEEN, (size + 1) // 2)]}
        parts["test"].append((request_desk.UNSEEN, size // 2))
        made = []
        for number, (families, count) in enumerate(parts.get(self.split, [(request_desk.SEEN, size)])):
            rng = Random(f"requests {self.seed} {self.split} {number}")
            name = f"requests-{self.split}-{number}"
            made += [request_desk.request_task(rng, f"{name}-{i:05d}", families) for i in range(count)]
        return made

    def start(self, task: Task) -> request_desk.RequestEpisode:
        return request_desk.RequestEpisode(task)


def service_desk(recipe: Recipe, split: str = "test") -> ServiceDesk | RequestDesk:
    """Customers with their wishes, tools and a database: the desk that `world.desk` names."""
    world = recipe.world
    sizes = {"warmup": world.warmup_tasks, "train": world.train_tasks, "test": world.test_tasks}
    if world.desk == "requests":
        return RequestDesk(recipe.seed, {**sizes, "validation": world.validation_tasks}, split)
    if split == "validation":  # last and for itself, so that the other splits are what they are without it
        return ServiceDesk(recipe.seed, {**sizes, "validation": world.validation_tasks}, split=split)
    return ServiceDesk(recipe.seed, sizes, split=split)


def validation(recipe: Recipe) -> ServiceDesk | RequestDesk:
    """Tasks that choose a checkpoint: none of them is a train or a test task."""
    return service_desk(recipe, "validation")


def puzzles(recipe: Recipe, split: str = "test") -> ServiceDesk:
    """Short text puzzles without tools: they have nothing to do with the desk."""
    sizes = {"warmup": recipe.world.puzzle_warmup_tasks, "test": recipe.world.puzzle_test_tasks}
    return ServiceDesk(recipe.seed, sizes, puzzle_task, split)
