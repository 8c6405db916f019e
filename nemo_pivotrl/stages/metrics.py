"""Metrics of a training run: always `metrics.jsonl`, and copies to TensorBoard, W&B and MLflow where asked for.

`metrics.jsonl` holds only what a resumed run repeats bit by bit; seconds and tokens a second go to `timing.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Logger
from nemo_pivotrl.records import InputError, Problem, canonical_json, write_atomically

Sink = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]
"""Send a step's metrics; close."""


class MetricsLog:
    """Appends to the two files and feeds the dashboards. Lines of steps that will run again are dropped on opening."""

    def __init__(self, folder: Path, first_step: int, settings: Logger, config: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.timing = folder / "metrics.jsonl", folder / "timing.jsonl"
        for path in (self.path, self.timing):
            kept = [row for row in read_metrics(path) if row["step"] <= first_step]
            write_atomically(path, "".join(canonical_json(row) + "\n" for row in kept))
        self.sinks = [
            open_sink(folder, settings, config) for name, open_sink in SINKS.items() if getattr(settings, name)
        ]

    def write(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """One line a step (1-based); step 0 is the policy before training."""
        for path, values in ((self.path, metrics), (self.timing, timing)):
            with path.open("a", encoding="utf-8") as handle:
                handle.write(canonical_json({"step": step, **values}) + "\n")
        for send, _ in self.sinks:
            send(step, {**metrics, **timing})

    def close(self) -> None:
        """End the dashboards' runs, so that another run of this process may begin."""
        for _, end in self.sinks:
            end()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn last one is ignored."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def _missing(name: str, error: ImportError) -> InputError:
    return InputError(
        Problem(
            "environment",
            None,
            f"logger.{name}",
            str(error),
            f"pip install 'nemo-pivotrl[{name}]' or set logger.{name}=false",
        )
    )


def _tensorboard(folder: Path, settings: Logger, config: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", error) from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send, writer.close


def _wandb(folder: Path, settings: Logger, config: dict[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", error) from error
    run = wandb.init(project=settings.project, name=folder.name, dir=str(folder), config=config)
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _mlflow(folder: Path, settings: Logger, config: dict[str, Any]) -> Sink:
    try:
        import mlflow
    except ImportError as error:
        raise _missing("mlflow", error) from error
    mlflow.set_experiment(settings.project)
    mlflow.start_run(run_name=folder.name)
    return lambda step, metrics: mlflow.log_metrics(dict(metrics), step=step), mlflow.end_run


SINKS: dict[str, Callable[[Path, Logger, dict[str, Any]], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
