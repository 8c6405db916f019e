"""The next command that a stage names: one that exists, with the same recipe and settings."""

import dataclasses
from pathlib import Path

import pytest

from nemo_pivotrl import cli
from nemo_pivotrl.cli.stages import NEXT, following
from nemo_pivotrl.config import Policy, Recipe

PLAIN = Recipe(run_dir="runs/my run")


def test_every_stage_that_is_named_exists() -> None:
    assert {*NEXT, *NEXT.values()} <= set(cli.STAGES)


@pytest.mark.parametrize(
    "stage, expected",
    [
        ("extract", "nemo-pivotrl profile r.yaml 'a.b=x y'"),
        ("rescore", "nemo-pivotrl select r.yaml 'a.b=x y' select.profiles=profiles.rescored.jsonl"),
        ("train", "nemo-pivotrl report r.yaml 'a.b=x y'"),
        ("tfpo", "nemo-pivotrl decode r.yaml 'a.b=x y'"),
        ("report", "nemo-pivotrl view 'runs/my run'"),
        ("run", "nemo-pivotrl view 'runs/my run'"),
    ],
)
def test_the_next_command_can_be_pasted_as_it_is(stage: str, expected: str) -> None:
    assert following(stage, PLAIN, "r.yaml", ["a.b=x y", "fresh=true"]) == expected


def test_policies_that_are_named_are_evaluated_next() -> None:
    named = dataclasses.replace(PLAIN, evaluate=dataclasses.replace(PLAIN.evaluate, policies={"base": "x"}))
    assert following("train", named, "r.yaml", []) == "nemo-pivotrl evaluate r.yaml"


def test_a_start_policy_that_the_warmup_has_still_to_make_is_made_next(tmp_path: Path) -> None:
    start = tmp_path / "start/policy"
    recipe = Recipe(run_dir=str(tmp_path), policy=Policy(model_name=str(start)))
    assert following("extract", recipe, "r.yaml", []) == "nemo-pivotrl warmup r.yaml"
    start.mkdir(parents=True)
    assert following("extract", recipe, "r.yaml", []) == "nemo-pivotrl profile r.yaml"
