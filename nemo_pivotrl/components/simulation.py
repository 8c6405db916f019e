"""Simulated tasks for `evaluate`: what a simulator of one's own has to offer, and how a recipe names it.

`evaluate.simulator` and `evaluate.retention` take an import path `package.module:function`. The function gets the
recipe and returns a `Simulator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.plugins import load_plugin
from nemo_pivotrl.core.types import Action, Message


class Task(Protocol):
    """One thing to be done. Tasks of one simulator are independent of each other."""

    @property
    def task_id(self) -> str:
        """Unique; seeds are made from it."""
        ...

    @property
    def family(self) -> str:
        """Kind of task; results are tabled by it."""
        ...


class Episode(Protocol):
    """One attempt at a task. The policy's turn is next until `done`."""

    messages: list[Message]
    """The conversation so far, as OpenAI chat messages."""
    tools: Sequence[dict[str, Any]]
    done: bool
    turns: int
    """Assistant turns so far."""

    @property
    def success(self) -> bool:
        """Whether the task was fulfilled. Asked when `done`, or after `Simulator.max_turns` turns."""
        ...

    def step(self, action: Action) -> None:
        """Take the policy's turn: append it and what answers it to `messages`. A malformed action is a turn, too."""
        ...


class Simulator(Protocol):
    """Tasks, and the episodes that play them."""

    max_turns: int
    """Assistant turns after which an episode ends without success."""

    def tasks(self) -> Sequence[Task]:
        """The test tasks, the same ones in the same order at every call."""
        ...

    def start(self, task: Any) -> Episode:
        """A new episode of one of the tasks."""
        ...


EMBEDDED = {
    "evaluate.simulator": "nemo_pivotrl.demo.simulators:service_desk",
    "evaluate.retention": "nemo_pivotrl.demo.simulators:puzzles",
    "checkpointing.simulator": "nemo_pivotrl.demo.simulators:validation",
}
"""What `world` means at each setting."""


def load_simulator(recipe: Recipe, field: str, value: str) -> Simulator:
    """The simulator that `value` of the setting `field` names. Raises InputError for a path that leads nowhere."""
    return cast("Simulator", load_plugin(EMBEDDED[field] if value == "world" else value, field)(recipe))
