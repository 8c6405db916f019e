"""PivotRL through NeMo-Aligner's own loop: signal, data, seeds and layouts."""

from typing import Any

import pytest
from conftest import Run

EPOCH = [f"c{i}" for i in range(12)]
LONG = {"trainer.pivotrl.max_steps": 12, "trainer.pivotrl.val_check_interval": 12, "trainer.pivotrl.save_interval": 12}


def series(found: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in found["rows"] if name in row]


def test_the_reward_rises_on_one_rank_and_every_pivot_is_drawn_once_an_epoch(run: Run) -> None:
    (found,) = run("train", **LONG)
    rewards = series(found, "train_rollouts/rewards")
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.25
    # the first update after sampling: policies and log-probabilities are the same to the bit, hence a KL of exactly 0
    assert series(found, "train_optim/policy_kl") == [0.0] * 12
    assert series(found, "train_optim/ratio") == pytest.approx([1.0] * 12, abs=1e-6)
    assert min(series(found, "train_optim/grad_norm")) > 0.1
    drawn = found["drawn"][:48]
    assert [sorted(drawn[i : i + 12]) for i in range(0, 48, 12)] == [sorted(EPOCH)] * 4
    assert drawn[:12] != drawn[12:24]
    assert found["drawn"][48:] == ["c12", "c13", "c14", "c15"]  # the held-out states
    assert found["state"] == {"step": 12, "consumed_samples": 48, "epoch": 4, "pivotrl_optimization_step": 12}


def test_tensor_and_pipeline_parallel_ranks_sample_and_train_as_one_rank_does(run: Run) -> None:
    # what is drawn depends on how many columns the logits have: 512 in every layout
    (alone,) = run("train", **{"model.make_vocab_size_divisible_by": 512})
    for layout, multiple in (({"tp": 2}, 256), ({"pp": 2}, 512)):
        ranks = run("train", 2, **layout, **{"model.make_vocab_size_divisible_by": multiple})
        for found in ranks:
            assert found["tokens"] == alone["tokens"], layout
            for name in ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/rewards"):
                assert series(found, name) == pytest.approx(series(alone, name), abs=2e-5), (layout, name)
    assert series(alone, "train_optim/grad_norm")[0] > 0.1


def test_data_parallel_ranks_share_the_pivots_and_agree_on_what_they_log(run: Run) -> None:
    first, second = run("train", 2, dp=2, **{"trainer.pivotrl.max_steps": 3})
    assert sorted(first["drawn"] + second["drawn"]) == sorted(EPOCH)
    assert first["tokens"] != second["tokens"]
    for name in ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/rewards", "train_rollouts/rollout_size"):
        assert series(first, name) == series(second, name), name
    assert series(first, "train_rollouts/rollout_size") == [16.0] * 3


def test_pivots_that_do_not_fill_a_last_batch_are_left_out_and_no_batch_is_short(run: Run) -> None:
    (found,) = run(
        "train",
        **{
            "trainer.pivotrl.max_steps": 3,
            "model.pivotrl.num_rollout_samples": 8,
            "model.global_batch_size": 32,
        },
    )
    # an epoch is one batch of 8 of the 12; three steps are three epochs
    assert [len(set(found["drawn"][i : i + 8])) for i in (0, 8, 16)] == [8, 8, 8]
    assert series(found, "train_rollouts/rollout_size") == [32.0] * 3


def test_several_optimiser_steps_from_one_rollout_leave_the_old_policy_behind(run: Run) -> None:
    (found,) = run("train", **{"model.global_batch_size": 8, "trainer.pivotrl.max_steps": 3})
    steps = series(found, "train_optim/optim_step")
    apart = series(found, "train_optim/policy_kl")
    assert steps == list(range(6))
    assert apart[0::2] == [0.0] * 3
    assert max(apart[1::2]) > 0.0


def test_turns_without_a_verdict_are_left_out_and_too_many_of_them_stop_the_run(run: Run) -> None:
    (found,) = run("train", fails_on="a", **{"trainer.pivotrl.max_failure_share": 1.0})
    assert max(series(found, "train_rollouts/failed")) > 0
    with pytest.raises(AssertionError, match="could not be judged"):
        run("train", fails_on="abcdefghijklmnopqrstuvwxyz")
