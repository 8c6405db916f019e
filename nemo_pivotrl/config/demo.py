"""Settings of the demo: its embedded worlds and the tiny models made for them. `recipe.py` has the recipe that they are part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_pivotrl.config.models import Optimizer
from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class World:
    """The embedded worlds of PivotRL and the tiny model made for them."""

    desk: Literal["shop", "requests"] = "shop"
    """Which one: `demo/service_desk.py`, four turns a conversation, or `demo/request_desk.py`, 9 to 16."""
    warmup_tasks: int = ranged(1000, 1)
    """Tasks from which the start policy learns the service desk."""
    train_tasks: int = ranged(120, 1)
    """Tasks whose trajectories PivotRL trains on."""
    validation_tasks: int = ranged(100, 1)
    """Tasks that choose a checkpoint, where `checkpointing.simulator` is `world`."""
    test_tasks: int = ranged(100, 1)
    """Tasks that `evaluate` plays. Of the request desk half are of families that the train trajectories show."""
    puzzle_warmup_tasks: int = ranged(8000, 1)
    """Puzzles from which the start policy learns what is later out of domain."""
    puzzle_test_tasks: int = ranged(200, 1)
    """Puzzles that measure what is kept out of domain."""
    vocab_size: int = ranged(512, 300)
    """Tokens of the tiny tokenizer."""
    hidden_size: int = ranged(96, 8)
    """Width of the tiny policy."""
    layers: int = ranged(3, 1)
    """Layers of the tiny policy."""
    heads: int = ranged(4, 1)
    """Attention heads of the tiny policy."""
    expert_error_rate: float = ranged(0.0, 0.0, 1.0)
    """How often the teachers of the start policy make errors; 0: never.

    It is a share of the desk's own rates, `EXPERT_ERRORS`.
    """
    teacher: Literal["house", "other"] = "house"
    """Whose wording the train trajectories have: that of the start policy's lessons, or another's who does the same."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Manners:
    """The embedded world of LLMdoctor (`demo/answer_styles.py`): a tiny patient, a smaller doctor, questions to ask."""

    source: Literal["lessons", "shipped"] = "lessons"
    """Train patient and novice on lessons, or take those that come with the package and have the default sizes."""
    lessons: int = ranged(4000, 1)
    """Conversations from which the tiny patient and the untrained doctor learn."""
    vocab_size: int = ranged(400, 300)
    """Tokens of the tiny tokenizer."""
    hidden_size: int = ranged(96, 8)
    """Width of the tiny patient."""
    layers: int = ranged(3, 1)
    """Layers of the tiny patient."""
    heads: int = ranged(4, 1)
    """Attention heads of both models."""
    doctor_hidden_size: int = ranged(48, 8)
    """Width of the tiny doctor."""
    doctor_layers: int = ranged(2, 1)
    """Layers of the tiny doctor."""
    num_steps: int = ranged(300, 1)
    """Training steps of each of the two models."""
    batch_size: int = ranged(32, 1)
    """Conversations a step."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=4e-3, beta2=0.98, warmup_steps=20))
