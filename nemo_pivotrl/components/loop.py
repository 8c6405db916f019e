"""The training loop of every stage that trains a model: resume, step, validate, save, stop at a deadline, publish.

What a step does, and on what data, is the stage's own (`Work`). A run that is complete returns without loading a model. A run
that stops at `checkpointing.checkpoint_must_save_by`, or is killed, resumes from its last checkpoint and ends with the same
bytes: a step must follow from its number and the trained state alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemo_pivotrl.backends.base import Trainer
from nemo_pivotrl.components import checkpoint
from nemo_pivotrl.components.costs import Entry, spend
from nemo_pivotrl.components.metrics import MetricsLog, read_metrics
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.config import Checkpointing, Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.chat_template import Chat

Row = dict[str, Any]
"""Metrics of a step by name; `step` among them where it is a line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step found."""

    metrics: Row
    """Only what a resumed run repeats bit by bit."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the cost log adds up, e.g. `tokens_trained`."""
    timing: Row = field(default_factory=dict)
    """For timing.jsonl; `seconds` is the whole step's unless it is given."""


class Work(Protocol):
    """A model in training. A stage makes one when there is something left to train."""

    @property
    def trainer(self) -> Trainer:
        """Ready for its first step: `prepare_for_training` has been called."""
        ...

    def step(self, number: int) -> Step:
        """Train one step, counted from 1."""
        ...

    def validate(self, step: int, last: bool, known: Row) -> Row:
        """The metrics that are due after `step` (0: before training) and not yet `known`; empty if none are."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training run."""

    recipe: Recipe
    stage: str
    """What the dashboards call it."""
    name: str
    """Folder under run_dir for checkpoints, metrics and the published model."""
    cost_name: str
    """Its stage in the cost log."""
    identity: str
    """A checkpoint with another identity belongs to another run."""
    settings: Mapping[str, Any]
    """The settings behind it by their names, to say which differ."""
    chat: Chat
    """Whose tokenizer is saved with the model."""
    steps: int
    steps_field: str
    """The setting that gives `steps`, for errors."""
    checkpointing: Checkpointing
    shown: Sequence[str] = ("loss",)
    """Metrics beside the progress bar."""
    ended: Callable[[Sequence[Row]], object | None] = lambda rows: None
    """Asked after every step, with all rows since step 0: a reason to end before the last step, or None."""

    @property
    def folder(self) -> Path:
        return self.recipe.path(self.name)


def run(job: Job, start: Callable[[Entry], Work], fresh: bool = False) -> Path:
    """Train `job`; returns the folder of the published model (HF).

    start: loads the model; it is given the run's line of the cost log. Not called where the run is complete. Raises
    InputError for a checkpoint of another run and for one beyond the last step, and `TimeLimitReached` (exit code 75) at
    the deadline, after saving.
    """
    limit = checkpoint.time_limit(job.checkpointing.checkpoint_must_save_by)
    if not fresh and (done := checkpoint.published(job.folder, job.identity, job.checkpointing)) is not None:
        rows = [row for row in read_metrics(job.folder / "metrics.jsonl") if row["step"] <= done]
        if done == job.steps or (done < job.steps and job.ended(rows) is not None):
            print(f"{job.folder / 'policy'} is complete, at step {done}; fresh=true trains anew")
            return job.folder / "policy"
    with spend(Path(job.recipe.run_dir), job.cost_name) as cost:
        work = start(cost)
        first = checkpoint.resume(job.folder, job.identity, work.trainer, fresh, job.settings)
        if first > job.steps:
            remedy = f"{job.folder} is already at step {first}; ask for at least that, or add fresh=true"
            raise InputError(Problem("recipe", None, job.steps_field, str(job.steps), remedy))
        _steps(job, work, first, limit, cost)
        return checkpoint.publish(job.folder, work.trainer, job.chat, job.checkpointing)


def _steps(job: Job, work: Work, first: int, limit: float, cost: Entry) -> None:
    """The steps after `first`. limit: seconds after this process began by which it must have saved."""
    log = MetricsLog(job.folder, first if first else -1, job.recipe, job.stage)
    rows: list[Row] = list(read_metrics(log.path))
    slowest = 0.0
    cost["steps"] = 0

    def note(step: int, row: Row, timing: Row) -> None:
        log.write(step, row, timing)
        rows.append({"step": step, **row})

    with progress(job.steps, first, job.name, "step") as bar:
        if first == 0 and (row := work.validate(0, False, {})):
            note(0, row, {})
        ending = job.ended(rows) if first else None
        for step in range(first + 1, job.steps + 1):
            if ending is not None:
                break
            began = time.monotonic()
            made = work.step(step)
            row = made.metrics | work.validate(step, step == job.steps, made.metrics)
            ending = job.ended([*rows, {"step": step, **row}])
            last = step == job.steps or ending is not None
            row |= work.validate(step, last, row)
            slowest = max(slowest, time.monotonic() - began)
            note(step, row, {"seconds": time.monotonic() - began} | made.timing)
            for name, count in {"steps": 1, **made.counts}.items():
                cost[name] = cost.get(name, 0) + count
            due = not last and checkpoint.is_due(limit, time.monotonic() - checkpoint.STARTED, slowest)
            scored = job.checkpointing.publish == "best" and job.checkpointing.metric_name in row
            if step % job.checkpointing.save_period == 0 or last or due or scored or checkpoint.HELD in row:
                meta = {"step": step, "identity": job.identity, "metrics": row, "settings": job.settings}
                checkpoint.save(job.folder, meta, work.trainer, job.chat, job.checkpointing)
            bar.set_postfix({name: f"{row[name]:.4g}" for name in job.shown}, refresh=False)
            bar.update()
            if due:
                log.close()
                raise checkpoint.TimeLimitReached(job.folder)
    log.close()
