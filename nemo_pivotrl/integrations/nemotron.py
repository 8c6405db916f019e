"""nemotron: trajectories and a policy to a pivot set and a better policy, both as artefacts of NVIDIA-NeMo/Nemotron's pipeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nemo_pivotrl.components import checkpoint
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories
from nemo_pivotrl.pivotrl.export import export, made_at
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.sft import makes_start_policy, warmup
from nemo_pivotrl.pivotrl.train import train


@one_writer
def nemotron(recipe: Recipe, fresh: bool = False) -> Path:
    """Every stage from extraction to training, resuming what is unfinished, then the artefacts; returns the policy."""
    if recipe.path("world/trajectories.jsonl") in map(Path, recipe.extract.trajectories):
        make_expert_trajectories(recipe, fresh)
    extract(recipe, fresh)
    if makes_start_policy(recipe):
        warmup(recipe, fresh)
    profile(recipe, fresh)
    select_pivots(recipe, fresh)
    export(dataclasses.replace(recipe, export=dataclasses.replace(recipe.export, target="nemotron")), fresh)
    policy = train(recipe, fresh)
    write_atomically(
        policy / "metadata.json",
        json.dumps(model_metadata(policy.absolute(), last_step(policy.parent)), indent=2) + "\n",
    )
    print(f"policy -> {policy}")
    return policy


def last_step(folder: Path) -> int:
    """The step of the latest checkpoint under `folder`."""
    return int(checkpoint.steps(folder)[-1].name.removeprefix("step_"))


def model_metadata(path: Path, step: int) -> dict[str, object]:
    """`metadata.json` of a `ModelArtifact`."""
    return {
        "path": str(path),
        "type": "ModelArtifact",
        "metadata": {"step": step, "format": "checkpoint_hf"},
        "created_at": made_at(),
        "producer": "local",
        "tracking": None,
        "name": "pivotrl/model",
        "step": step,
        "final_loss": None,
    }
