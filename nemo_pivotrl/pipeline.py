"""run: all stages of a recipe in one command."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from nemo_pivotrl.backends.launch import place_of
from nemo_pivotrl.components import costs as ledger
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories
from nemo_pivotrl.pivotrl.evaluate import evaluate
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.loop import gains, loop, read_history
from nemo_pivotrl.pivotrl.select import select
from nemo_pivotrl.pivotrl.sft import makes_start_policy, sft, warmup
from nemo_pivotrl.pivotrl.train import train
from nemo_pivotrl.pivotrl.verifier_audit import audit
from nemo_pivotrl.report import page as report
from nemo_pivotrl.tools.checks import ROLES, preflight

Stage = Callable[[Recipe, bool], Path]


def run(recipe: Recipe, fresh: bool = False) -> Path:
    """Every stage the recipe needs, resuming what is unfinished, PivotRL's in rounds (`loop.py`). Returns the report.

    A `random` arm (same number of candidates, no profiling) trains beside the pivots when evaluate.policies names one.
    """
    start = time.perf_counter()
    if fresh:
        recipe.path("ledger.jsonl").unlink(missing_ok=True)
    stages = _llmdoctor(recipe) if recipe.algorithm == "llmdoctor" else _pivotrl(recipe, fresh)
    for stage in [*stages, report.report]:
        if stage is not loop:  # which names its own stages
            print(f"\n== {stage.__name__.strip('_').removeprefix('make_')}")
        if (name := "profile" if stage is loop else stage.__name__) in ROLES:
            preflight(recipe, name, place_of(os.environ).world)
        path = stage(recipe, fresh)
    pivots, points = gains(read_history(Path(recipe.run_dir)))
    print("\n" + ledger.table(ledger.read_ledgers(Path(recipe.run_dir)), recipe.budget.gpus, pivots, points))
    print(f"\nreport: {path} ({time.perf_counter() - start:.0f} s)")
    return path


def _pivotrl(recipe: Recipe, fresh: bool) -> list[Stage]:
    if recipe.path("world/trajectories.jsonl") in map(Path, recipe.extract.trajectories):
        make_expert_trajectories(recipe, fresh)
    policies = recipe.evaluate.policies
    steps: list[Stage] = [extract]
    if recipe.audit.before_profile and (fresh or not recipe.path("profiles.jsonl").exists()):
        steps.append(audit)
    steps += [warmup, loop] if makes_start_policy(recipe) else [loop]
    steps += [sft] if recipe.sft.name in policies else []
    steps += [_random_arm] if "random" in policies else []
    return [*steps, evaluate]


def _llmdoctor(recipe: Recipe) -> list[Stage]:
    """Preferences in, a doctor out, a patient steered. The embedded world is made where the recipe's patient is in it."""
    from nemo_pivotrl.demo.answer_styles_models import make_manners
    from nemo_pivotrl.llmdoctor.assess import assess
    from nemo_pivotrl.llmdoctor.preferences import preferences
    from nemo_pivotrl.llmdoctor.rank import rank
    from nemo_pivotrl.llmdoctor.reward import reward
    from nemo_pivotrl.llmdoctor.train_doctor import tfpo

    embedded = Path(recipe.patient.model_name).resolve() == recipe.path("patient/policy").resolve()
    steps = [make_manners] if embedded else []
    steps += [rank] if recipe.rank.objectives else []
    steps += [preferences, reward, tfpo]
    return [*steps, assess] if recipe.assess.arms else steps


def _random_arm(recipe: Recipe, fresh: bool = False) -> Path:
    """The paper's comparison: as many turns drawn at random, trained alike."""
    drawn = dataclasses.replace(recipe, select=dataclasses.replace(recipe.select, rule="random", output="random.jsonl"))
    select(drawn, fresh)
    return train(
        dataclasses.replace(recipe, grpo=dataclasses.replace(recipe.grpo, name="random", pivots="random.jsonl")), fresh
    )
