"""PivotRL on the real thing at its smallest: tool calls of the embedded world, under its verifier."""

from statistics import mean

from conftest import Run
from test_pivotrl_train import series


def test_reward_rises_on_the_tool_use_world(run: Run) -> None:
    (found,) = run("train_world", warmup=50, steps=24)
    rewards = series(found, "train_rollouts/rewards")
    assert len(rewards) == 24 and series(found, "train_rollouts/failed") == [0.0] * 24
    assert 0.3 < mean(rewards[:6]) < 0.8  # the start policy half knows them
    assert mean(rewards[-6:]) > mean(rewards[:6]) + 0.06, rewards  # its standard error at a fixed policy is 0.04
    malformed = series(found, "train_rollouts/malformed_share")
    assert mean(malformed[-6:]) < mean(malformed[:6])
