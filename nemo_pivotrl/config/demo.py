"""Settings of the demo: its embedded worlds and the tiny models made for them. `recipe.py` has the recipe that they are part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_pivotrl.config.models import Optimizer
from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class World:
    """The embedded service-desk world (`demo/service_desk.py`) and the tiny model made for it."""

    warmup_tasks: int = ranged(1000, 1)
    train_tasks: int = ranged(120, 1)
    test_tasks: int = ranged(100, 1)
    puzzle_warmup_tasks: int = ranged(8000, 1)
    puzzle_test_tasks: int = ranged(200, 1)
    vocab_size: int = ranged(512, 300)
    hidden_size: int = ranged(96, 8)
    layers: int = ranged(3, 1)
    heads: int = ranged(4, 1)
    slips: float = ranged(0.0, 0.0, 1.0)
    """How careless those are from whom the start policy learns the desk: share of the rates `world.SLIPS`. 0: they are experts."""
    teacher: Literal["house", "other"] = "house"
    """Whose wording the train trajectories have: that of the start policy's lessons, or another's who does the same."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Manners:
    """The embedded world of LLMdoctor (`demo/answer_styles.py`): a tiny patient, a smaller doctor, questions to ask."""

    lessons: int = ranged(4000, 1)
    vocab_size: int = ranged(400, 300)
    hidden_size: int = ranged(96, 8)
    layers: int = ranged(3, 1)
    heads: int = ranged(4, 1)
    doctor_hidden_size: int = ranged(48, 8)
    doctor_layers: int = ranged(2, 1)
    num_steps: int = ranged(300, 1)
    batch_size: int = ranged(32, 1)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=4e-3, beta2=0.98, warmup_steps=20))
