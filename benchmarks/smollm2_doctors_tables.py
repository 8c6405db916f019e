"""Tables and curves of `smollm2_doctors.py`, and its statistics: scores at equal KL, with intervals over prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl.core.atomic import write_atomically

Result = dict[str, Any]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value) + "\n")


def mean_kl(rows: Sequence[Result]) -> float:
    """Nats an answer."""
    return float(np.mean([row["kl"] for row in rows]))
