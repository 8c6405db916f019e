"""The trainer's counters inside the checkpoint, as a Lightning callback's state.

NeMo-Aligner reads them back out of the checkpoint's directory name, with 0 for what it does not find there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from lightning.pytorch.callbacks import Callback  # noqa: E402

FORMAT = 1


class TrainingState(Callback):  # type: ignore[misc]
    """Give it to the Lightning trainer before the checkpoint is restored, and call `attach` once our trainer stands."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.restored: dict[str, int] | None = None

    @property
    def state_key(self) -> str:
        """The callback's name in the checkpoint."""
        return "nemo_pivotrl"

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {"format": FORMAT, **self.trainer.state_dict()} if self.trainer is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called while the checkpoint is restored. Raises InputError for another format."""
        state = dict(state_dict)
        if state.pop("format", None) != FORMAT:
            remedy = f"this version reads format {FORMAT}: resume with the version that wrote the checkpoint"
            raise InputError(Problem("checkpoint", None, "nemo_pivotrl.format", str(state_dict.get("format")), remedy))
        self.restored = {name: int(value) for name, value in state.items()}

    def attach(self, trainer: Any, resumed: bool) -> None:
        """Save `trainer`'s state from now on, and restore it where a checkpoint was `resumed`.

        Raises InputError for a checkpoint without our state: counting from 0 would train on the same data again.
        """
        self.trainer = trainer
        if self.restored is not None:
            trainer.load_state_dict(self.restored)
        elif resumed:
            remedy = "it was not written by this trainer: start from its weights with pretrained_checkpoint instead"
            raise InputError(Problem("checkpoint", None, "callbacks", "no nemo_pivotrl state", remedy))
