"""Complete training states on disk: written atomically, resumed exactly, the best few kept.

`FOLDER/step_00010/` holds `policy/` (an ordinary HF checkpoint), `state.pt` (weights in training, optimiser, random
state) and `meta.json`. A folder appears by rename, so what is there is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_pivotrl.backends import Trainer
from nemo_pivotrl.chat import Chat
from nemo_pivotrl.config import Checkpointing
from nemo_pivotrl.records import InputError, Problem


def save(
    folder: Path,
    step: int,
    identity: str,
    metrics: dict[str, float],
    trainer: Trainer,
    chat: Chat,
    settings: Checkpointing,
) -> None:
    """Write the state after `step` steps, then drop checkpoints that are neither the latest nor among the best."""
    import torch

    part = folder / f"step_{step:05d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    trainer.export(part / "policy")
    chat.tokenizer.save_pretrained(part / "policy")
    torch.save(trainer.training_state(), part / "state.pt")
    (part / "meta.json").write_text(
        json.dumps({"step": step, "identity": identity, "metrics": metrics}), encoding="utf-8"
    )
    final = folder / f"step_{step:05d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _prune(folder, settings)


def _prune(folder: Path, settings: Checkpointing) -> None:
    found = steps(folder)
    sign = -1.0 if settings.higher_is_better else 1.0
    scored = sorted(
        (p for p in found if settings.metric_name in _meta(p)["metrics"]),
        key=lambda p: (sign * _meta(p)["metrics"][settings.metric_name], p.name),
    )
    keep = {*scored[: settings.keep_top_k], found[-1]}
    for path in found:
        if path not in keep:
            shutil.rmtree(path)


def steps(folder: Path) -> list[Path]:
    """Checkpoints in order of step."""
    return sorted(p for p in folder.glob("step_*") if not p.name.endswith(".part"))


def _meta(path: Path) -> dict[str, Any]:
    return json.loads((path / "meta.json").read_text(encoding="utf-8"))


def resume(folder: Path, identity: str, trainer: Trainer, fresh: bool) -> int:
    """Restore the latest state and return its step, 0 where there is none (or `fresh`, which drops all).

    Raises InputError when the state belongs to another recipe or other data.
    """
    import torch

    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    found = steps(folder)
    if not found:
        return 0
    meta = _meta(found[-1])
    if meta["identity"] != identity:
        raise InputError(
            Problem(
                str(found[-1]),
                None,
                "identity",
                meta["identity"],
                f"this recipe and its data give {identity}; use another name for the new run, or add fresh=true to drop the old one",
            )
        )
    trainer.restore_training_state(torch.load(found[-1] / "state.pt", weights_only=True))
    return int(meta["step"])


def publish(folder: Path, trainer: Trainer, chat: Chat) -> Path:
    """Write the final policy as `FOLDER/policy`, atomically."""
    part, final = folder / "policy.part", folder / "policy"
    shutil.rmtree(part, ignore_errors=True)
    trainer.export(part)
    chat.tokenizer.save_pretrained(part)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    return final
