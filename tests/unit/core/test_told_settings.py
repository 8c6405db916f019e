"""What differs between two recipes is named by its setting, with its old and its new value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_pivotrl.components import checkpoint
from nemo_pivotrl.components.journal import Journal
from nemo_pivotrl.components.lineage import check_headers
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, first_line, is_complete, read_header, write_artefact
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.told_settings import difference, named

RECIPE = Recipe()


def header(recipe: Recipe, tells: bool = True) -> Header:
    return Header("pivots", recipe.digest("select"), settings=recipe.told("select") if tells else {})


def with_lambda(value: float) -> Recipe:
    return replace(RECIPE, select=replace(RECIPE.select, lambda_diff=value))


OLD, NEW = header(with_lambda(0.9)), header(with_lambda(0.6))


def test_settings_have_their_full_names_and_a_difference_says_old_and_new() -> None:
    told = named(RECIPE, "policy.generation", "select", but=("select.rule",))
    assert {"policy.generation.temperature", "select.lambda_diff"} <= told.keys() and "select.rule" not in told
    assert difference({"a": 1, "b": (1, 2)}, {"a": 2, "b": [1, 2]}) == "a=1 (now 2)"
    assert difference({"a": None}, {"b": 1}) == "b=nothing (now 1), a=None (now nothing)"
    assert difference({"a": 1}, {"a": 1}) == difference({}, {"a": 1}) == ""
    assert difference({f"s{n}": 0 for n in range(12)}, {f"s{n}": 1 for n in range(12)}).endswith("and 4 more")


def test_a_finished_artefact_of_another_recipe_names_the_setting(tmp_path: Path) -> None:
    path = write_artefact(tmp_path / "pivots.jsonl", OLD, [{"candidate_id": "a"}])
    assert read_header(path, "pivots").settings["select.lambda_diff"] == 0.9
    with pytest.raises(InputError) as caught:
        is_complete(path, NEW, False)
    assert caught.value.problems[0].found == "select.lambda_diff=0.9 (now 0.6)"
    assert is_complete(path, header(with_lambda(0.9), tells=False), False)  # settings are told, not compared by


def test_an_artefact_without_settings_is_taken_and_its_difference_is_a_hash(tmp_path: Path) -> None:
    silent = header(with_lambda(0.9), tells=False)
    assert b"settings" not in first_line(silent)
    path = write_artefact(tmp_path / "pivots.jsonl", silent, [])
    assert is_complete(path, OLD, False)
    with pytest.raises(InputError, match=r"config_hash='\w+' \(now '\w+'\)"):
        is_complete(path, NEW, False)


def test_unfinished_work_of_another_recipe_names_the_setting(tmp_path: Path) -> None:
    for told in (OLD.to_told_line(), OLD.to_line()):
        path = tmp_path / "journal"
        journal = Journal(path, told.encode(), fresh=True)
        journal.finish(0, b"{}\n", 1, 1)
        journal.close()
        again = Journal(path, OLD.to_told_line().encode())
        assert again.done
        again.close()
        with pytest.raises(InputError) as caught:
            Journal(path, NEW.to_told_line().encode())
        found = caught.value.problems[0].found
        assert found == "select.lambda_diff=0.9 (now 0.6)" if "settings" in told else "config_hash" in found


def test_pivots_of_another_verifier_name_its_setting(tmp_path: Path) -> None:
    kept = replace(RECIPE, verifier=replace(RECIPE.verifier, settings={"threshold": 0.1}))
    now = replace(RECIPE, verifier=replace(RECIPE.verifier, settings={"threshold": 0.2}))
    found = Header("pivots", "h", verifier="functional 1 aa", settings=kept.told("verifier", "select"))
    with pytest.raises(InputError, match=r"verifier.settings.threshold=0.1 \(now 0.2\)"):
        check_headers(tmp_path / "x", found, now.told("verifier", "policy"), verifier="functional 1 bb")


def test_a_checkpoint_of_another_recipe_names_the_setting_and_other_data_their_hash(tmp_path: Path) -> None:
    folder = tmp_path / "step_00003"
    folder.mkdir()
    told = RECIPE.told("grpo")
    meta = {"step": 3, "identity": "old", "metrics": {}, "settings": told}
    (folder / checkpoint.META).write_text(json.dumps(meta, default=str))
    trainer = SimpleNamespace()
    now = told | {"grpo.num_prompts_per_step": 7}
    with pytest.raises(InputError) as caught:
        checkpoint.resume(tmp_path, "new", trainer, False, now)  # type: ignore[arg-type]
    before = RECIPE.grpo.num_prompts_per_step
    assert caught.value.problems[0].found == f"grpo.num_prompts_per_step={before} (now 7)"
    with pytest.raises(InputError, match="old, and this recipe with its weights and data gives new"):
        checkpoint.resume(tmp_path, "new", trainer, False, told)  # type: ignore[arg-type]
