"""world: the demo's expert trajectories, written as any other input."""

from __future__ import annotations

import json
import random
from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.demo import request_desk, service_desk, simulators


@one_writer
def make_expert_trajectories(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the experts' conversations on the train tasks as OpenAI chat JSONL."""
    rng, teacher = random.Random(f"train experts {recipe.seed}"), recipe.world.teacher
    made = (
        request_desk.conversation(task, rng, lambda: teacher)
        if recipe.world.desk == "requests"
        else service_desk.expert_trajectory(task, rng, teacher)
        for task in simulators.service_desk(recipe, "train").tasks()
    )
    lines = [json.dumps({key: value for key, value in record.items() if key != "wording"}) for record in made]
    path = recipe.path("world/trajectories.jsonl")
    write_atomically(path, "\n".join(lines) + "\n")
    return path
