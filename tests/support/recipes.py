"""The tiny recipes, smaller still."""

from __future__ import annotations

from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "recipes/pivotrl/tiny.yaml")
SMALL = [
    "num_threads=1",
    "world.warmup_tasks=200",
    "world.train_tasks=24",
    "world.test_tasks=6",
    "world.puzzle_warmup_tasks=400",
    "world.puzzle_test_tasks=10",
    "world.hidden_size=48",
    "world.layers=1",
    "warmup.num_steps=90",
    "warmup.copy_steps=0",
    "profile.num_generations=8",
    "profile.candidates_per_chunk=8",
    "profile.min_wave=2",
    "select.rule=mixed",
    "sft.num_steps=3",
    "grpo.max_num_steps=4",
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.val_period=2",
    "grpo.val_candidates=6",
    "grpo.val_generations=2",
    "checkpointing.save_period=1",
    "evaluate.one_turn_candidates=8",
    "evaluate.num_generations=2",
]

SMALL_LLMDOCTOR = [
    "num_threads=1",
    "manners.lessons=400",
    "manners.hidden_size=48",
    "manners.layers=2",
    "manners.doctor_hidden_size=32",
    "manners.doctor_layers=1",
    "manners.num_steps=60",
    "rank.answers_per_prompt=4",
    "tfpo.max_num_steps=6",
    "tfpo.pairs_per_step=8",
    "tfpo.val_period=3",
    "assess.limit=6",
    "assess.samples=2",
    "decode.max_new_tokens=24",
    "decode.mode=ratio",  # reads the doctors' references, too
]


def recipe_at(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe, smaller still, with its run directory at `folder`."""
    return load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), [f"run_dir={folder}", *SMALL, *overrides])
