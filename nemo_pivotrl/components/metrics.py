"""Metrics of a training run: always `metrics.jsonl`, and copies on the dashboards that the recipe asks for.

`metrics.jsonl` holds only what a resumed run repeats bit by bit; seconds and tokens a second go to `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.trackers import open_feeds
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.atomic import append_line, open_input, write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""JSON has no such numbers: a line holds their names, as protobuf's JSON does, and `read_metrics` gives the numbers back."""


class MetricsLog:
    """Appends to the two files and feeds the dashboards. Lines of steps that will run again are dropped on opening."""

    def __init__(self, folder: Path, first_step: int, recipe: Recipe, stage: str):
        """first_step: the last step that is done, -1 where not even step 0 is. Raises InputError when a dashboard cannot start."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.timing = folder / "metrics.jsonl", folder / "timing.jsonl"
        rows, timing = read_metrics(self.path), read_metrics(self.timing)
        self.feeds = open_feeds(recipe, folder, stage, first_step)
        rows, timing = ([row for row in some if row["step"] <= first_step] for some in (rows, timing))
        write_atomically(self.path, "".join(map(_line, rows)))
        write_atomically(self.timing, "".join(map(_line, timing)))
        timing_of = {row["step"]: row for row in timing}
        for row in rows:  # a dashboard that was off or away until now
            self._feed({**timing_of.get(row["step"], {}), **row})

    def write(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """One line a step (1-based); step 0 is the policy before training."""
        for path, values in ((self.path, metrics), (self.timing, timing)):
            append_line(path, _line({"step": step, **values}).encode())
        self._feed({"step": step, **metrics, **timing})

    def _feed(self, row: Mapping[str, Any]) -> None:
        for feed in self.feeds:
            feed.send(row["step"], {name: value for name, value in row.items() if name != "step"})

    def close(self) -> None:
        """End the dashboards' runs, so that another run of this process may begin."""
        for feed in self.feeds:
            feed.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn last one is ignored. Raises InputError for a line in the middle that is no row."""
    found = []
    if not path.exists():
        return []
    with open_input(path) as handle:
        lines = handle.read().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found.append({key: float(value) if value in NOT_FINITE else value for key, value in row.items()})
        except (ValueError, AttributeError):
            text = short(line.decode("utf-8", "replace"))
            raise InputError(Problem(str(path), number, "line", text, "no row of metrics; delete the line")) from None
    return found


def _line(row: Mapping[str, Any]) -> str:
    return canonical_json({key: _named(value) for key, value in row.items()}) + "\n"


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
