"""`swe` where its numbers decide: half credit, and how much of a file is looked at."""

import json
from typing import Any

import pytest

from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.base import Verdict
from nemo_pivotrl.verifiers.swe import Swe


def judged(
    verifier: Swe, expected: dict[str, Any], actual: dict[str, Any], tool: str = "str_replace_editor"
) -> Verdict:
    one, other = (Action("calls", calls=(ToolCall(tool, json.dumps(arguments)),)) for arguments in (expected, actual))
    return verifier.verify(Case(one), other)


@pytest.mark.parametrize(
    ("mode", "reward"), [("binary", 0.0), ("continuous", pytest.approx(0.5 + 0.5 * (0.6 - 0.4) / (0.8 - 0.4)))]
)
def test_half_credit_is_for_continuous_rewards_alone(mode: Any, reward: Any) -> None:
    edit = {"command": "str_replace", "path": "/a/b.py", "old_str": "x = 1"}
    verifier = Swe(reward_mode=mode, enable_diff_size_shaping=False)
    verdict = judged(verifier, {**edit, "new_str": "aaaaaabbbb"}, {**edit, "new_str": "aaaaaacccc"})
    assert verdict.figures["similarity"] == pytest.approx(0.6) and verdict.reward == reward
    assert verdict.category == ("similarity_below_threshold" if mode == "binary" else "none")


@pytest.mark.parametrize(
    ("needed", "shown", "reward"),
    [([1, 101], [51, 61], 0.0), ([1, 11], [1, 101], 1.0), ([1, 101], [1, 81], 1.0), ([1, 101], [1, 80], 0.0)],
)
def test_a_view_must_show_four_fifths_of_the_lines_that_the_expert_looked_at(
    needed: list[int], shown: list[int], reward: float
) -> None:
    view = {"command": "view", "path": "/a/b.py"}
    verdict = judged(Swe(), {**view, "view_range": needed}, {**view, "view_range": shown})
    assert verdict.reward == reward and verdict.category == ("none" if reward else "target_mismatch")
