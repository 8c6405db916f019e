"""A stage's command in a process of its own, to be ended by its own end or by SIGKILL."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from support.processes import Process, kill_when, python
from support.recipes import SMALL, TINY

__all__ = ["finish", "kill_when", "said", "sha", "start"]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(row: dict[str, Any]) -> list[tuple[str, float]]:
    """What was drawn for a candidate. Log-probabilities are equal to rounding only, since other rows decode beside it."""
    return [(sample["text"], sample["reward"]) for sample in row["samples"]]


def start(stage: str, folder: Path, *overrides: str, flags: tuple[str, ...] = (), log: Path | None = None) -> Process:
    """The stage on the tiny recipe; what it prints is in `log`, or in `log.txt` of its run directory."""
    words = ["-m", "nemo_pivotrl.cli", stage, TINY, *flags, f"run_dir={folder}", *SMALL, *overrides]
    return python(*words, out=log or folder / "log.txt")


def finish(process: Process) -> None:
    assert process.wait() == 0, process.printed()
