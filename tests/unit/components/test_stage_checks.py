"""Checks of extraction, fine-tuning, evaluation and LLMdoctor's stages: each warns of the number that it is for, and of no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nemo_pivotrl.components.conclusions import Check
from nemo_pivotrl.components.stage_checks import (
    assessment_checks,
    doctor_checks,
    evaluation_checks,
    extract_checks,
    held_out_checks,
    preference_checks,
    rescore_checks,
    reward_checks,
    sft_checks,
)


def warned(checks: Sequence[Check]) -> list[str]:
    assert all(check.remedy for check in checks)
    return [check.name for check in checks if not check.good]


def extraction(**changes: Any) -> dict[str, Any]:
    files = {"in.jsonl": {"records": 100, "left_out": {"broken_json": changes.pop("broken", 0)}}}
    audit = {"turns": 400, "skipped": {"tool_error": 10}, "kept": {"train": 350, "validation": 40}, "files": files}
    return audit | changes


@pytest.mark.parametrize(
    ("audit", "talk", "expected"),
    [
        (extraction(), 100, []),
        (extraction(broken=11), 0, ["records left out"]),
        (extraction(skipped={"tool_error": 201}), 0, ["assistant turns skipped"]),
        (extraction(), 200, ["candidates where the expert talks"]),
        (extraction(kept={"train": 127, "validation": 15}), 0, ["candidates to train on", "candidates held out"]),
    ],
)
def test_an_extraction(audit: dict[str, Any], talk: int, expected: list[str]) -> None:
    assert warned(extract_checks(audit, talk)) == expected


def test_another_verifier() -> None:
    assert warned(rescore_checks(10, 100, 32, 0, 50)) == []
    assert warned(rescore_checks(11, 100, 31, 6, 50)) == [
        "verdicts that change",
        "failed candidates",
        "pivots by this verifier",
    ]


def test_a_fine_tuning_that_learns_nothing_or_forgets() -> None:
    falling = [{"step": n, "loss": 2.0 - 0.1 * n} for n in range(1, 13)]
    assert warned(sft_checks(falling)) == [] and sft_checks(falling[:2]) == []
    assert warned(sft_checks([row | {"loss": 1.0} for row in falling])) == ["loss"]
    assert warned(held_out_checks([{"val/tasks": 0.4}, {"val/tasks": 0.3}])) == ["success in held-out tasks"]
    assert warned(held_out_checks([{"val/accuracy": 0.4}, {"reward": 1}, {"val/accuracy": 0.4}])) == []


def evaluated(mean: float, low: float, high: float, items: int = 50, failed: int = 0) -> dict[str, Any]:
    return {"items": items, "failed": failed, "difference": {"mean": mean, "low": low, "high": high}}


def test_policies_side_by_side() -> None:
    base = {"one_turn": {"items": 50, "failed": 0}}
    better = {
        "one_turn": evaluated(0.1, -0.1, 0.3),
        "multi_turn": evaluated(0.2, 0.1, 0.3),
        "retention": evaluated(-0.01, -0.02, 0.0),
    }
    assert warned(evaluation_checks({"policies": {"base": base, "new": better}})) == []
    worse = {"one_turn": evaluated(0.1, -0.1, 0.3), "retention": evaluated(-0.1, -0.2, -0.01, 50, 60)}
    checks = evaluation_checks({"policies": {"base": base, "new": worse}})
    assert warned(checks) == ["new: held-out turns", "new: out of domain", "items that failed"]
    assert checks[0].found == "+10.0 [-10.0, +30.0] points" and "no gain is shown" in checks[0].remedy
    lost = evaluation_checks({"policies": {"base": base, "new": {"one_turn": evaluated(-0.1, -0.2, -0.01)}}})
    assert "got worse" in lost[0].remedy


def test_preferences() -> None:
    audit = {"records": 100, "kept": {"train": 80, "validation": 20}, "contradictions": 0, "chosen_is_longer": 0.5}
    assert warned(preference_checks(audit)) == []
    assert warned(preference_checks(audit | {"chosen_is_longer": 0.8})) == ["chosen answer is the longer one"]
    few = {"kept": {"train": 30, "validation": 10}, "contradictions": 5, "chosen_is_longer": None}
    expected = ["pairs to train on", "records skipped", "pairs stated both ways round"]
    assert warned(preference_checks(audit | few)) == expected


def test_token_rewards() -> None:
    good = {"pairs": {"train": 90, "validation": 10}, "weak_share": 0.1, "kept_share": 0.1}
    good |= {"agreement": {"chosen": 0.8, "rejected": 0.9}}
    assert warned(reward_checks({"objectives": {"kind": good}, "pairs": 100, "excluded": {}})) == []
    bad = good | {"weak_share": 0.6, "kept_share": 0.001, "agreement": {"chosen": 0.9, "rejected": 0.5}}
    found = warned(reward_checks({"objectives": {"kind": bad}, "pairs": 100, "excluded": {"too_long": 20}}))
    assert found == ["kind: weak pairs", "kind: tokens with a reward", "kind: agreement of the faces", "pairs excluded"]


def test_a_doctor() -> None:
    first = {"val/loss": 2.0, "val/ordered": 0.5}
    last = {"val/loss": 1.0, "val/ordered": 0.8, "val/chosen_drift": -0.5, "val/rejected_drift": -9.0}
    assert warned(doctor_checks([first, {"loss": 9.0}, last])) == [] and doctor_checks([first]) == []
    bad = {"loss": 2.5, "ordered": 0.4, "chosen_drift": -1.5, "rejected_drift": 0.0}
    found = warned(doctor_checks([{"loss": 2.0, "ordered": 0.5}, bad]))
    assert found == ["loss on train pairs", "pairs in the right order", "drift from the start model"]


def arm(beta: float, win: float, kl: float = 0.1, different: float | None = 0.9) -> dict[str, Any]:
    objective = {"win": [win, win - 0.1, win + 0.1], "lose": [0.2, 0.1, 0.3]}
    setting = {"beta": {"kind": beta} if beta else {}}
    return {"setting": setting, "objectives": {"kind": objective}, "kl": kl, "different_answers": different}


def test_steered_answers() -> None:
    plain = {"patient": arm(0, 0.0), "greedy": arm(0, 0.0, different=0.0)}
    assert assessment_checks({"arms": plain}) == []
    assert warned(assessment_checks({"arms": plain | {"kind 1": arm(1, 0.5), "kind 9": arm(9, 0.3)}})) == []
    found = warned(assessment_checks({"arms": plain | {"kind 9": arm(9, 0.3, kl=2.0, different=0.1)}}))
    assert found == ["steered arms that gain", "steered arms far from the patient", "steered arms that answer alike"]
    alone = {label: entry | {"different_answers": None} for label, entry in (plain | {"kind 1": arm(1, 0.5)}).items()}
    assert warned(assessment_checks({"arms": alone})) == []  # one answer to a prompt: nothing to tell apart
