"""run: all stages of a recipe in one command."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

from nemo_pivotrl.algorithms.selection import Rule
from nemo_pivotrl.backends.launch import place_of
from nemo_pivotrl.components import conclusions, costs as ledger
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories
from nemo_pivotrl.pivotrl.evaluate import evaluate
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.loop import gains, loop, read_history
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.sft import makes_start_policy, sft, warmup
from nemo_pivotrl.pivotrl.train import train
from nemo_pivotrl.pivotrl.verifier_audit import audit
from nemo_pivotrl.report import page as report
from nemo_pivotrl.tools.checks import ROLES, preflight

Stage = Callable[[Recipe, bool], Path]


@one_writer
def run(recipe: Recipe, fresh: bool = False) -> Path:
    """Every stage the recipe needs, resuming what is unfinished, PivotRL's in rounds (`loop.py`). Returns the report.

    An arm trains beside the pivots for each rule of `select.rule` that evaluate.policies names, e.g. `random`: as many candidates,
    not filtered.

    >>> page = run(load_recipe("llmdoctor.yaml", ["run_dir=runs/steered"]))
    >>> page.name
    'report.html'
    """
    start = time.perf_counter()
    if fresh:
        for name in ("ledger.jsonl", conclusions.FILE):
            recipe.path(name).unlink(missing_ok=True)
    stages = _llmdoctor(recipe) if recipe.algorithm == "llmdoctor" else _pivotrl(recipe, fresh)
    for name, stage in {**stages, "report": report.report}.items():
        if stage is not loop:  # which names its own stages
            print(f"\n== {name}")
        if name in ROLES:
            preflight(recipe, name, place_of(os.environ).world)
        path = stage(recipe, fresh)
    pivots, points = gains(read_history(Path(recipe.run_dir)))
    print("\n" + ledger.table(ledger.read_ledgers(Path(recipe.run_dir)), recipe.budget.gpus, pivots, points))
    if warned := conclusions.warnings_of(Path(recipe.run_dir)):
        print(f"\n{len(warned)} checks warn (the report says what to do): {'; '.join(warned)}", end="")
    for folder in (recipe.path("final/policy"), *sorted(Path(recipe.run_dir).glob("doctor*/policy"))):
        if folder.exists():
            print(f"\n{'policy' if folder.parent.name == 'final' else 'doctor'}: {folder}", end="")
    print(f"\nreport: {path} ({time.perf_counter() - start:.0f} s)")
    return path


def _pivotrl(recipe: Recipe, fresh: bool) -> dict[str, Stage]:
    if recipe.path("world/trajectories.jsonl") in map(Path, recipe.extract.trajectories):
        make_expert_trajectories(recipe, fresh)
    policies = recipe.evaluate.policies
    stages: dict[str, Stage] = {"extract": extract}
    if recipe.audit.before_profile and (fresh or not recipe.path("profiles.jsonl").exists()):
        stages["audit"] = audit
    if makes_start_policy(recipe):
        stages["warmup"] = warmup
    stages["profile"] = loop
    if recipe.sft.name in policies:
        stages["sft"] = sft
    for rule in get_args(Rule):
        if rule in policies:
            stages[f"arm {rule}"] = partial(_arm, rule=rule)
    return {**stages, "evaluate": evaluate}


def _llmdoctor(recipe: Recipe) -> dict[str, Stage]:
    """Preferences in, a doctor out, a patient steered. The demo's patient is made where the recipe's patient is it."""
    from nemo_pivotrl.demo.answer_styles_models import make_manners
    from nemo_pivotrl.llmdoctor.assess import assess
    from nemo_pivotrl.llmdoctor.preferences import preferences
    from nemo_pivotrl.llmdoctor.rank import rank
    from nemo_pivotrl.llmdoctor.reward import build_rewards
    from nemo_pivotrl.llmdoctor.train_doctor import train_doctor

    stages: dict[str, Stage] = {"manners": make_manners} if recipe.maker("patient") else {}
    if recipe.rank.objectives:
        stages["rank"] = rank
    stages |= {"preferences": preferences, "reward": build_rewards, "tfpo": train_doctor}
    return {**stages, "assess": assess} if recipe.assess.arms else stages


def _arm(recipe: Recipe, fresh: bool = False, *, rule: Rule) -> Path:
    """Another selection from the same profile, trained alike; `all` and `random` are the paper's comparisons."""
    file = f"{rule}.jsonl"
    drawn = dataclasses.replace(recipe, select=dataclasses.replace(recipe.select, rule=rule, output=file))
    select_pivots(drawn, fresh)
    return train(dataclasses.replace(recipe, grpo=dataclasses.replace(recipe.grpo, name=rule, pivots=file)), fresh)
