"""The verdict table: what warns, what does not, and that a stage's remedies are kept for the report and the viewer."""

from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.components.conclusions import (
    Check,
    audit_checks,
    conclude,
    pivot_checks,
    profile_checks,
    read_checks,
    table,
    training_checks,
    warnings_of,
)


def warned(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.good]


def profiled(**changed: Any) -> dict[str, Any]:
    classes = {
        "mixed, kept": {"candidates": 60, "train": 40},
        "all 0": {"candidates": 40},
        "mixed, too easy": {},
        "all 1": {},
    }
    return {"rollouts": 758, "truncated": 10, "malformed": 0, "failures": {}, "classes": classes} | changed


def test_a_profile_of_truncated_samples_warns_with_the_share_and_what_to_raise() -> None:
    assert warned(profile_checks(profiled())) == []
    (check,) = (c for c in profile_checks(profiled(truncated=703)) if not c.good)
    assert check.found == "92.7% (703 of 758)" and "max_new_tokens" in check.remedy
    assert warned(profile_checks(profiled(malformed=90))) == ["malformed or empty samples"]
    assert warned(profile_checks(profiled(failures={"sampler_timeout": 20}))) == ["failed candidates"]
    few = {
        "mixed, kept": {"candidates": 60, "train": 3},
        "all 0": {"candidates": 40},
        "mixed, too easy": {},
        "all 1": {},
    }
    assert warned(profile_checks(profiled(classes=few))) == ["train candidates with mixed rewards"]


def test_pivots_that_are_few_or_talk_or_won_by_a_constant_warn() -> None:
    assert warned(pivot_checks(100, 10, ("the text 'ok'", 0.1))) == []
    assert warned(pivot_checks(14, 14, ("the text 'ok'", 1.0))) == [
        "pivots",
        "pivots where the expert talks",
        "best constant answer",
    ]
    assert [c.name for c in pivot_checks(100, 0, None)] == ["pivots", "pivots where the expert talks"]


def test_a_lenient_verifier_warns() -> None:
    summary = {"candidates": 10, "unlosable": [], "unwinnable": [], "by_probe": {"x": {"wrong": 50, "false_accept": 2}}}
    assert warned(audit_checks(summary)) == []
    summary["by_probe"] = {"x": {"wrong": 50, "false_accept": 20}}
    assert warned(audit_checks(summary | {"unwinnable": ["a"]})) == [
        "wrong actions accepted",
        "candidates nobody can win",
    ]


def steps(entropy: tuple[float, float] = (1.0, 1.0), **row: float) -> list[dict[str, Any]]:
    plain = {"reward": 0.5, "mixed_group_share": 0.6, "truncated_share": 0.0, "malformed_share": 0.0}
    return [plain | row | {"step": n, "entropy": entropy[n > 5]} for n in range(1, 11)]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], []),
        (steps(), []),
        (steps(mixed_group_share=0.0, truncated_share=1.0), ["groups with a gradient", "truncated samples"]),
        (steps(entropy=(1.0, 0.01)), ["entropy, end to start"]),
        (steps(entropy=(1.0, 9.0)), ["entropy, end to start"]),
        ([*steps(), {"step": 11, "val/kl": 4.0}], ["distance from the start policy"]),
    ],
)
def test_a_training_that_learns_nothing_or_runs_away_warns(rows: list[dict[str, Any]], expected: list[str]) -> None:
    assert warned(training_checks(rows)) == expected


def test_a_stage_prints_its_table_and_keeps_it_beside_those_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude(tmp_path, "profile", [Check("a", "1", True), Check("b\x1b[2J", "2", False, "mend it")]) == {
        "warnings": 1.0
    }
    conclude(tmp_path, "select", [Check("c", "3", True)])
    shown = capsys.readouterr().out
    assert "ok    a" in shown and "WARN  b\\x1b" in shown and "-> mend it" in shown
    assert {stage: [c["good"] for c in checks] for stage, checks in read_checks(tmp_path).items()} == {
        "profile": [True, False],
        "select": [True],
    }
    assert warnings_of(tmp_path) == ["profile: b\\x1b[2J"] and warnings_of(tmp_path / "none") == []
    assert table([]) == "verdict"
