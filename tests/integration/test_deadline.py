"""`checkpoint_must_save_by`: NeMo-RL's form, and when a run has to stop."""

import math
import shutil
from pathlib import Path

import pytest
from support.recipes import ROOT, SMALL

from nemo_pivotrl import cli
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.components.checkpoint import TimeLimitReached, is_due, time_limit
from nemo_pivotrl.core.errors import TRY_AGAIN, InputError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", math.inf), ("00:03:45:00", 13500.0), ("01:00:00:01", 86401.0), ("10:23:59:59", 950399.0)],
)
def test_a_deadline_is_days_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize(
    "text", ["3:45:00", "00:03:45", "00:24:00:00", "00:00:60:00", "00:00:00:60", "00:00:00:00", "1h", "-1:00:00:00", "00:03:45:00 "]
)  # fmt: skip
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        time_limit(text)
    (problem,) = caught.value.problems
    assert problem.field == "checkpointing.checkpoint_must_save_by" and "00:03:45:00" in problem.remedy


def test_a_run_stops_before_a_step_would_pass_its_deadline() -> None:
    assert not is_due(100.0, 69.9, 30.0)
    assert is_due(100.0, 70.0, 30.0) and is_due(100.0, 130.0, 0.0)
    assert not is_due(math.inf, 1e12, 1e6)


def test_a_paused_run_exits_with_a_code_of_its_own() -> None:
    with pytest.raises(SystemExit) as caught:
        raise TimeLimitReached(Path("step_00003"))
    assert caught.value.code == TRY_AGAIN == 75


@pytest.mark.slow
def test_training_stops_at_its_deadline_saved_and_the_same_command_ends_as_if_it_had_not(
    trained: Path, tmp_path: Path
) -> None:
    made = {}
    for name, deadline in (("straight", ""), ("paused", "00:00:00:01")):
        shutil.copytree(trained, tmp_path / name)
        words = ["train", str(ROOT / "recipes/pivotrl/tiny.yaml"), f"run_dir={tmp_path / name}", *SMALL]
        words += [f"policy.model_name={trained}/start/policy", "checkpointing.save_period=100", "grpo.max_num_steps=3"]
        if deadline:
            with pytest.raises(SystemExit) as caught:
                cli.main([*words, f"checkpointing.checkpoint_must_save_by='{deadline}'"])
            assert caught.value.code == TRY_AGAIN
            saved = [path.name for path in (tmp_path / name / "pivotrl").glob("step_*")]
            assert saved == ["step_00001"] and not (tmp_path / name / "pivotrl/policy").exists()
        assert cli.main(words) == 0
        made[name] = policy_revision(tmp_path / name / "pivotrl/policy")
    assert made["paused"] == made["straight"]
