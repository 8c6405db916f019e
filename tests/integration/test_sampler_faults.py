"""A sampler's faults: lost turns are excluded and counted, never scored; one that disagrees with the trainer is masked or stops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import recipe_at

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.backends import loading
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import FailedSample, Sample
from nemo_pivotrl.pivotrl.evaluate import sampled
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.train import train

MANY = ["profile.max_failure_share=1.0", "profile.max_retries=0", "profile.curtail=none"]


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def losing(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Of what the sampler draws, lose every so-manyth turn: an injected fault."""
    load, count = loading.load, iter(range(1 << 30))

    def broken(*arguments: Any, **named: Any) -> Any:
        backend = load(*arguments, **named)
        infer = backend.infer

        def lossy(*a: Any) -> list[list[Sample | FailedSample]]:
            return [
                [FailedSample("sampler_timeout", "gone") if next(count) % every == 0 else s for s in group]
                for group in infer(*a)
            ]

        backend.infer = lossy
        return backend

    monkeypatch.setattr(loading, "load", broken)


def test_a_profile_excludes_candidates_that_lost_a_turn_and_scores_none_of_them(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile(recipe_at(run_dir, *MANY))
    before = list(read_rows(run_dir / "profiles.jsonl"))
    losing(monkeypatch, every=3 * 8)  # one turn of every third candidate
    profile(recipe_at(run_dir, *MANY), True)
    rows = list(read_rows(run_dir / "profiles.jsonl"))
    failed = [row for row in rows if row["profile"]["failure"]]
    assert len(failed) == math.ceil(len(rows) / 3) and {r["profile"]["failure"] for r in failed} == {"sampler_timeout"}
    assert not any(row["samples"] or "pass_rate" in row for row in failed)
    for old, new in zip(before, rows, strict=True):
        assert new["profile"]["failure"] or new["pass_rate"] == old["pass_rate"]
    assert f"excluded: {len(failed)} candidates, sampler_timeout" in capsys.readouterr().out


def test_a_profile_that_lost_too_much_stops(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, every=8)
    with pytest.raises(InputError) as caught:
        profile(recipe_at(run_dir, "profile.max_retries=0"), True)
    assert caught.value.problems[0].field == "profile.max_failure_share"


def test_training_leaves_lost_turns_out_of_every_statistic(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, every=5)
    train(recipe_at(run_dir, "grpo.max_failure_share=1.0", "grpo.max_num_steps=2"))
    steps = [json.loads(line) for line in (run_dir / "pivotrl/metrics.jsonl").read_text().splitlines()]
    assert all(step["failed"] == pytest.approx(16 / 5, abs=1) for step in steps if "failed" in step)
    assert any("val/kl" in step and math.isfinite(step["val/kl"]) for step in steps)


def test_an_evaluation_stops_at_a_lost_turn() -> None:
    kept = [[Sample((1,), (-1.0,), "stop")]]
    assert sampled(kept) == kept
    with pytest.raises(InputError, match="sampler_timeout"):
        sampled([*kept, [FailedSample("sampler_timeout", "gone")]])


# ---- the gate between sampler and trainer ----


def shifted(monkeypatch: pytest.MonkeyPatch, shift: Sequence[float]) -> None:
    """Let the sampler report its k-th turn's log-probabilities too low by so much: another arithmetic, injected."""
    load = loading.load

    def other(*arguments: Any, **named: Any) -> Any:
        backend = load(*arguments, **named)
        infer = backend.infer

        def wrong(*a: Any) -> list[list[Sample]]:
            return [
                [
                    Sample(s.token_ids, tuple(lp - by for lp in s.log_probs), s.finish_reason)
                    for s, by in zip(g, shift, strict=True)
                ]
                for g in infer(*a)
            ]

        backend.infer = wrong
        return backend

    monkeypatch.setattr(loading, "load", other)


STEP = ["grpo.max_num_steps=1", "grpo.val_period=0"]


def metrics_of(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "pivotrl/metrics.jsonl").read_text().splitlines()[-1])  # type: ignore[no-any-return]


def test_samples_on_which_sampler_and_trainer_disagree_are_masked_and_counted(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe_at(run_dir, *STEP, "loss_fn.seq_logprob_error_threshold=1.5"), True)
    plain = metrics_of(run_dir)
    assert plain["sampler_masked"] == 0 and plain["sampler_mismatch"] < 1e-4
    shifted(monkeypatch, [1.0, 0.0, 0.0, 0.0])  # exp(1) > 1.5: the first of each group's four
    train(recipe_at(run_dir, *STEP, "loss_fn.seq_logprob_error_threshold=1.5"), True)
    gated = metrics_of(run_dir)
    assert gated["sampler_masked"] > 0 and gated["sampler_mismatch"] < 1e-4
    assert gated["grad_norm"] != plain["grad_norm"] and gated["reward"] == plain["reward"]
    train(recipe_at(run_dir, *STEP), True)
    assert metrics_of(run_dir)["sampler_mismatch"] > 0.1 and "sampler_masked" not in metrics_of(run_dir)


def test_a_step_whose_samples_all_disagree_moves_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, [2.0] * 4)
    train(recipe_at(run_dir, *STEP, "loss_fn.seq_logprob_error_threshold=1.5"), True)
    assert metrics_of(run_dir)["grad_norm"] == 0 and metrics_of(run_dir)["trained_share"] == 0


def test_too_much_mismatch_stops_the_run_before_the_update(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, [0.3] * 4)
    train(recipe_at(run_dir, *STEP, "loss_fn.max_sampler_mismatch=0.31"), True)
    with pytest.raises(InputError) as caught:
        train(recipe_at(run_dir, *STEP, "loss_fn.max_sampler_mismatch=0.29"), True)
    assert caught.value.problems[0].field == "loss_fn.max_sampler_mismatch" and "0.3" in caught.value.problems[0].found


def test_sequence_error_is_the_mean_of_exponentials() -> None:
    generator = torch.Generator().manual_seed(3)
    old, sampler = torch.randn(5, 7, generator=generator).double(), torch.randn(5, 7, generator=generator).double()
    mask = (torch.rand(5, 7, generator=generator) > 0.3).double()
    mask[4] = 0
    found = pivotrl.sequence_error(old, sampler, mask)
    for n in range(5):
        terms = [math.exp(abs(float(old[n, t] - sampler[n, t]))) for t in range(7) if mask[n, t]]
        assert found[n].item() == pytest.approx(sum(terms) / len(terms) if terms else 1.0, abs=1e-12)
    assert torch.equal(pivotrl.sequence_error(old, old, mask), torch.ones(5).double())
    assert torch.equal(pivotrl.sequence_error(sampler, old, mask), found), "whichever side is the likelier"
    assert math.isfinite(pivotrl.sequence_error(old * 1e6, sampler, mask).max())
