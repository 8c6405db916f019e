"""Hub ids: a copy in the cache is used without a network, what cannot be had says how to have it, and a path stays a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pivotrl.backends.hub import is_hub_id, local_copy, with_local_models
from nemo_pivotrl.config import Evaluate, Policy, Recipe
from nemo_pivotrl.core.errors import InputError


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of `maker/model` in a cache of its own; no hub can be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--maker--model"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_what_reads_as_an_id_and_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert is_hub_id("Qwen/Qwen3-0.6B")
    for path in ("mine/model", "models/Qwen3", "/abs/model", "./a/b", "a/b/c", "model", ""):
        assert not is_hub_id(path), path


def test_a_cached_copy_takes_the_place_of_the_id_and_a_path_stays(cached: Path) -> None:
    recipe = Recipe(policy=Policy(model_name="maker/model"), evaluate=Evaluate(policies={"base": "maker/model"}))
    found = with_local_models(recipe, fetch=True)
    assert found.policy.model_name == found.evaluate.policies["base"] == str(cached)
    assert local_copy("models/mine", "policy.model_name", fetch=True) == "models/mine"


def test_without_a_network_the_remedy_is_a_command(cached: Path) -> None:
    assert local_copy("maker/other", "policy.model_name", fetch=False) == "maker/other"
    with pytest.raises(InputError, match="hf download maker/other --local-dir models/other") as error:
        local_copy("maker/other", "policy.model_name", fetch=True)
    assert error.value.problems[0].field == "policy.model_name"
