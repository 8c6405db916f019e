"""A tiny trained policy, made once a session, and the recipe around it."""

import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small LLMdoctor run. Tests that change what is in it put it back."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.pipeline import run

    folder = tmp_path_factory.mktemp("llmdoctor") / "run"
    run(load_recipe(str(ROOT / "recipes/llmdoctor/tiny.yaml"), [f"run_dir={folder}", *SMALL_LLMDOCTOR]))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a start policy, candidates, profiles and pivots. Tests copy it before they change it."""
    from nemo_pivotrl.pipeline import make_world
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.profile import profile
    from nemo_pivotrl.pivotrl.select import select
    from nemo_pivotrl.pivotrl.sft import warmup

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = recipe_at(folder)
    for stage in (make_world, extract, warmup, profile, select):
        stage(recipe)
    return folder


@pytest.fixture(scope="session")
def workers() -> Iterator[Any]:
    """Ranks on this machine's CPUs, over gloo (`distributed/distributed_harness.py`), for the tests in `distributed`."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed: pip install 'nemo-pivotrl[megatron]'")
    if torch.cuda.is_available():
        pytest.skip("these tests run Megatron on CPUs, which it refuses where there is a CUDA device")
    from distributed_harness import Workers  # a test in its folder asked for this, so pytest has put that on the path

    pool = Workers()
    yield pool
    pool.stop()
