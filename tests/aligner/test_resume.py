"""A run that is killed after a checkpoint goes on as if it had not been, its counters read out of the checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

PIVOTRL = {
    "trainer.pivotrl.max_steps": 4,
    "trainer.pivotrl.val_check_interval": 2,
    "trainer.pivotrl.save_interval": 2,
}
JOBS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "resumable": (
        PIVOTRL,
        ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/rewards", "val_rollouts/rewards"),
    ),
    "resumable_doctor": ({}, ("train/loss", "train/grad_norm", "val/loss")),
}


def series(found: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in found["rows"] if name in row]


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_run_resumes_with_the_same_losses(run: Run, tmp_path: Path, job: str) -> None:
    settings, names = JOBS[job]
    (whole,) = run(job, die=False, **settings)
    shutil.rmtree(tmp_path / "logs")
    (killed,) = run(job, die=True, **settings)
    # NeMo-Aligner finds its counters in this name; ours are inside
    for folder in (tmp_path / "logs/checkpoints").iterdir():
        if "step=" in folder.name:
            folder.rename(
                folder.with_name(folder.name.replace("step=2", "step=7").replace("consumed_samples=8", "x=1"))
            )
    (resumed,) = run(job, die=False, **settings)
    assert (whole["first"], killed["first"], resumed["first"]) == (0, 0, 2)
    assert resumed["state"] == whole["state"]
    for name in names:
        halves = series(killed, name) + series(resumed, name)
        assert halves == pytest.approx(series(whole, name), rel=1e-6), name


def test_a_run_out_of_time_saves_and_the_next_goes_on(run: Run) -> None:
    long = PIVOTRL | {"trainer.pivotrl.max_steps": 300}  # more than any machine does in a second
    (first,) = run("resumable", die=False, **long, **{"exp_manager.max_time_per_run": "00:00:00:01"})
    reached = first["state"]["step"]
    assert 0 < reached < 300  # the step that was begun is finished, validated and saved
    assert len(series(first, "val_rollouts/rewards")) >= 1
    (second,) = run("resumable", die=False, **PIVOTRL | {"trainer.pivotrl.max_steps": reached + 1})
    assert (second["first"], second["state"]["step"]) == (reached, reached + 1)
