"""LLMdoctor's second stage through NeMo-Aligner's own DPO loop, against the reference backend (`golden.json`)."""

from collections import Counter
from typing import Any

import pytest
import tiny_aligner
from conftest import Run

LAYOUTS = {
    "one rank": (1, 1, 1, 2, "none"),
    "one rank, anchored": (1, 1, 1, 4, "reference"),
    "TP=2": (2, 1, 1, 2, "none"),
    "PP=2, anchored": (1, 2, 1, 1, "reference"),
    "DP=2": (1, 1, 2, 2, "none"),
}


def series(found: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in found["rows"] if name in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_and_gradient_are_the_reference_backends(run: Run, name: str) -> None:
    tp, pp, dp, mbs, anchor = LAYOUTS[name]
    wanted = tiny_aligner.golden()[f"tfpo_{anchor}"]
    for found in run("doctor_loss", tp * pp * dp, tp=tp, pp=pp, dp=dp, mbs=mbs, anchor=anchor):
        for metric, value in found["metrics"].items():
            assert value == pytest.approx(wanted[metric], rel=2e-5, abs=2e-5), metric
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)


def test_the_loss_falls_and_validation_and_data_are_what_they_should_be(run: Run) -> None:
    (found,) = run("train_doctor")
    losses = series(found, "train/loss")
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert len(series(found, "val/loss")) == 2
    train = [row.split()[1] for row in found["drawn"] if row.startswith("train")]
    # ten pairs make two batches of four an epoch; the two left over are another two in the next
    assert [max(Counter(train[i : i + 8]).values()) for i in (0, 8)] == [1, 1]
    assert found["state"] == {"step": 4, "consumed_samples": 16, "epoch": 2}


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["TP=2", "PP=2"])
def test_two_ranks_that_share_a_model_train_as_one(run: Run, layout: dict[str, int]) -> None:
    (alone,) = run("train_doctor")
    for found in run("train_doctor", 2, **layout):
        assert series(found, "train/loss") == pytest.approx(series(alone, "train/loss"), rel=1e-4)
        assert series(found, "val/loss") == pytest.approx(series(alone, "val/loss"), rel=1e-4)


def test_data_parallel_ranks_train_on_different_pairs_and_agree(run: Run) -> None:
    first, second = run("train_doctor", 2, dp=2)
    assert series(first, "train/loss") == series(second, "train/loss")
    seen = [[row for row in found["drawn"] if row.startswith("train")] for found in (first, second)]
    assert not set(seen[0]) & set(seen[1])
    assert series(first, "train/loss")[-1] < series(first, "train/loss")[0]
