"""The report's first sentences say what is better, worse and not shown, and the funnel counts down to the pivots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.recipes import recipe_at

from nemo_pivotrl.components.conclusions import Check, conclude
from nemo_pivotrl.report import verdict


def change(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"difference": {"mean": mean, "low": low, "high": high}}


def test_policies_with_a_gain_a_loss_and_an_open_set() -> None:
    sets = {
        "multi_turn": change(0.117, 0.05, 0.187),
        "one_turn": change(0.1, -0.1, 0.3),
        "retention": change(-0.02, -0.03, -0.01),
    }
    sft = {"multi_turn": change(0.053, -0.023, 0.127), "retention": change(-0.47, -0.5, -0.44)}
    better, worse, open_ = verdict.of_policies({"base": {}, "sft": sft, "pivotrl": sets}, "pivotrl")
    assert better == "pivotrl against base: +11.7 points [+5.0, +18.7] of whole tasks."
    assert worse == "pivotrl loses 2.0 points [1.0, 3.0] out of domain."
    assert open_ == (
        "Not shown: +10.0 points [-10.0, +30.0] of held-out turns: the interval holds 0; "
        "sft +5.3 points [-2.3, +12.7] of whole tasks: the interval holds 0."
    )


def test_what_was_not_measured_is_not_shown_and_nothing_is_claimed() -> None:
    better, worse, open_ = verdict.of_policies({"base": {}, "mine": {"one_turn": change(0.0, 0.0, 0.0)}}, "pivotrl")
    assert better == "No gain of mine over base is shown." and "Nothing that was measured got worse" in worse
    assert "evaluate.simulator" in open_ and "evaluate.retention" in open_


def arm(beta: dict[str, float], **objectives: tuple[float, float]) -> dict[str, Any]:
    def share(value: float) -> list[float]:
        return [value, value - 0.1, value + 0.1]

    return {
        "setting": {"beta": beta},
        "objectives": {name: {"win": share(win), "lose": share(lose)} for name, (win, lose) in objectives.items()},
    }


def test_steered_arms() -> None:
    arms = {
        "patient": arm({}, kind=(0, 0), brief=(0, 0)),
        "kind 1": arm({"kind": 1.0}, kind=(0.6, 0.1), brief=(0.1, 0.5)),
        "kind 2": arm({"kind": 2.0}, kind=(0.3, 0.25), brief=(0.2, 0.2)),
    }
    better, worse, open_ = verdict.of_arms({"arms": arms, "prompts": 36})
    assert "in 1 of 2 cases" in better and "kind 1 wins 60% and loses 10% on kind" in better
    assert worse == "kind 1 loses 50% and wins 10% on brief."
    assert "that kind 2 on kind differ from patient" in open_ and "36 prompts" in open_
    assert verdict.of_arms({"arms": {"patient": arms["patient"]}, "prompts": 1})[0].startswith("No steered arm")


def test_trainings_that_were_not_evaluated() -> None:
    rows = [{"val/accuracy": 0.5, "val/tasks": 0.4}, {"reward": 1.0}, {"val/accuracy": 0.75, "val/tasks": 0.3}]
    better, worse, open_ = verdict.of_training(rows)
    assert "from 0.500 to 0.750, one measurement each" in better and "from 0.400 to 0.300" in worse
    assert "nemo-pivotrl evaluate" in open_ and verdict.of_training([])[0].startswith("No gain")
    better, worse, open_ = verdict.of_doctors({"kind": [{"val/ordered": 0.5}, {"val/ordered": 0.8}]})
    assert better == "kind orders 80.0% of its held-out pairs, 50.0% before." and "nemo-pivotrl assess" in open_
    assert verdict.untrained({"pivots": {"count": 12}})[0] == "Nothing is trained yet; 12 pivots are ready."


def test_the_funnel_and_the_warnings(tmp_path: Path) -> None:
    fates = {
        "a": {"pivot": 2, "all 0": 3, "too easy": 1, "failed": 1, "left out": 3, "all": 10},
        "b": {"pivot": 1, "all 1": 1, "all": 2},
    }
    numbers: dict[str, Any] = {
        "audit": {"turns": 20, "kept": {"train": 12, "validation": 3}},
        "profile": {"candidates": 12},
        "survival": {"x": fates},
    }
    numbers["pivots"] = {"count": 3}
    assert [(name, count) for name, count, _ in verdict.funnel(numbers)] == [
        ("assistant turns", 20),
        ("candidates", 15),
        ("candidates to train on", 12),
        ("of these profiled and judged", 8),
        ("of these with mixed outcomes", 4),
        ("pivots", 3),
    ]
    conclude(tmp_path, "select", [Check("pivots", "3", False, "extract more"), Check("talk", "0", True)])
    verdict.gather(recipe_at(tmp_path), numbers)
    assert [w["stage"] + " " + w["name"] for w in numbers["warnings"]] == ["select pivots"]
    assert set(numbers["verdict"]) == {"better", "worse", "not_shown"}
