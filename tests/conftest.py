"""Fixtures that many tests share: a tiny trained policy, a steered patient, ranks. The recipes around them: `support/recipes.py`."""

import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# for the fork server, which imports `support.preload` by its name
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.path.dirname(__file__)])

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from support import threads
from support.artefacts import made_once, own_copy
from support.recipes import ROOT, SMALL, SMALL_LLMDOCTOR, recipe_at

from nemo_pivotrl.config.load import load_recipe

__all__ = ["ROOT", "SMALL", "SMALL_LLMDOCTOR", "recipe_at"]

# `ci` finds the same examples on every machine; `dev` looks for new ones, and keeps those that failed
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


ORDER = ("distributed", "integration", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that the workers end together: each of them takes the next file when it is done with one."""

    def room(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT / "tests").parts[0]
        return ORDER.index(name) if name in ORDER else len(ORDER)

    items.sort(key=room)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """One thread for arithmetic, and at most `threads.MOST` in every process of the tests."""
    torch.set_num_threads(1)
    yield
    threads.check()


@pytest.fixture(scope="session")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small LLMdoctor run. Tests that change what is in it put it back."""
    return own_copy(steered_run(), tmp_path_factory, "llmdoctor")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a start policy, candidates, profiles and pivots. Tests copy it before they change it."""
    return own_copy(trained_run(), tmp_path_factory, "trained")


def trained_run() -> Path:
    def make(folder: Path) -> None:
        from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
        from nemo_pivotrl.pivotrl.extract import extract
        from nemo_pivotrl.pivotrl.profile import profile
        from nemo_pivotrl.pivotrl.select import select_pivots
        from nemo_pivotrl.pivotrl.sft import warmup

        torch.set_num_threads(1)
        recipe = recipe_at(folder)
        for stage in (make_world, extract, warmup, profile, select_pivots):
            stage(recipe)

    return made_once("trained", SMALL, make)


def steered_run() -> Path:
    def make(folder: Path) -> None:
        from nemo_pivotrl.pipeline import run

        run(load_recipe(str(ROOT / "recipes/llmdoctor/tiny.yaml"), [f"run_dir={folder}", *SMALL_LLMDOCTOR]))

    return made_once("steered", SMALL_LLMDOCTOR, make)


@pytest.fixture(scope="session")
def workers() -> Iterator[Any]:
    """Ranks on this machine's CPUs, over gloo (`support/workers.py`), for the tests in `distributed`."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed: pip install 'nemo-pivotrl[megatron]'")
    if torch.cuda.is_available():
        pytest.skip("these tests run Megatron on CPUs, which it refuses where there is a CUDA device")
    from support.workers import Workers  # a test in its folder asked for this, so pytest has put that on the path

    pool = Workers()
    yield pool
    pool.stop()
