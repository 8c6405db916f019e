"""world: the demo's expert trajectories, written as any other input."""

from __future__ import annotations

import json
import random
from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.demo import service_desk, simulators


@one_writer
def make_expert_trajectories(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the experts' conversations on the train tasks as OpenAI chat JSONL."""
    rng = random.Random(f"train experts {recipe.seed}")
    lines = [
        json.dumps(service_desk.expert_trajectory(task, rng, recipe.world.teacher))
        for task in simulators.service_desk(recipe, "train").tasks()
    ]
    path = recipe.path("world/trajectories.jsonl")
    write_atomically(path, "\n".join(lines) + "\n")
    return path
