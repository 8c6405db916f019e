"""Whole validation tasks, played while a policy trains: what a checkpoint is chosen by (`checkpointing.publish: best`)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from nemo_pivotrl.backends.base import Sampler
from nemo_pivotrl.components.simulation import load_simulator
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.pivotrl.evaluate import play

METRIC = "val/tasks"
"""Share of the validation tasks that end well."""


def whole_tasks(
    recipe: Recipe, sampler: Sampler, chat: Chat, step: int, last: bool, known: Mapping[str, Any]
) -> dict[str, float]:
    """`METRIC` where it is due after `step` and not `known`: every `checkpointing.simulator_period` steps, first and last.

    An episode a task, sampled as `evaluate` does and with the same seeds every time, so that only the policy changes. Raises
    InputError for a simulator without tasks.
    """
    settings = recipe.checkpointing
    due = last or step % settings.simulator_period == 0
    if settings.simulator == "none" or METRIC in known or not due:
        return {}
    simulator = load_simulator(recipe, "checkpointing.simulator", settings.simulator)
    generation = dataclasses.replace(recipe.policy.generation, temperature=recipe.evaluate.temperature)
    policy = dataclasses.replace(recipe.policy, generation=generation)
    episodes = play(simulator, simulator.tasks(), ("validation", recipe.seed), policy, sampler, chat)
    if not episodes:
        remedy = "give a simulator that has tasks"
        raise InputError(Problem("recipe", None, "checkpointing.simulator", settings.simulator, remedy))
    return {METRIC: statistics.fmean(e.success for e in episodes)}
