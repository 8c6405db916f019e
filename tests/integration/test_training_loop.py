"""The one training loop as `sft` and `tfpo` run it: a complete run loads nothing, a deadline saves, resuming changes no byte."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemo_pivotrl.backends import loading
from nemo_pivotrl.components import checkpoint
from nemo_pivotrl.components.costs import read_ledger
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import build
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.chat_template import Chat, load_tokenizer
from nemo_pivotrl.demo import tiny_models as tiny
from nemo_pivotrl.llmdoctor.train_doctor import train_doctor
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.sft import sft


class Stage(NamedTuple):
    """A stage that trains for four steps on what lies in its run directory."""

    run: Callable[..., Path]
    section: str
    folder: str
    steps: str
    """The setting that gives its steps."""


STAGES = {
    "tfpo": Stage(train_doctor, "tfpo", "doctor", "max_num_steps"),
    "sft": Stage(sft, "sft", "sft", "num_steps"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with its tokenizer."""
    tokenizer = tiny.make_tokenizer(["say something nice or something rude about the weather today"] * 4, 300)
    folder = tmp_path_factory.mktemp("start")
    tiny.save(tiny.make_model(tokenizer, 16, 1, 1, seed=1), tokenizer, folder)
    return str(folder)


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


@pytest.fixture
def recipe(stage: Stage, start: str, tmp_path: Path) -> Callable[..., Recipe]:
    """The stage's recipe, whose sections take changes; its data lies in `tmp_path/run`."""

    def made(**changes: dict[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "policy": {"model_name": start},
            "doctor": {"model_name": start, "optimizer": {"lr": 5e-3}},
            "extract": {"trajectories": [str(tmp_path / "talks.jsonl")], "near_duplicate": 1.0},
            "verifier": {"message": "any"},
            "sft": {"source": "candidates", "num_steps": 4, "batch_size": 3, "optimizer": {"lr": 5e-3}},
            "tfpo": {"pairs_per_step": 3, "max_num_steps": 4, "val_period": 2},
            "checkpointing": {"save_period": 100},
        }
        for name, section in changes.items():
            values[name] = {**values[name], **section}
        found = build(Recipe, values, "test")
        assert isinstance(found, Recipe)
        return found

    (write_rewards if stage.section == "tfpo" else write_talks)(made(), start, tmp_path)
    return made


def write_talks(recipe: Recipe, start: str, folder: Path) -> None:
    talks = [
        [{"role": "user", "content": f"the weather {i}"}, {"role": "assistant", "content": f"nice today {i}"}]
        for i in range(8)
    ]
    lines = [json.dumps({"id": f"t{i}", "task_id": f"k{i}", "messages": talk}) for i, talk in enumerate(talks)]
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n")
    extract(recipe)


def write_rewards(recipe: Recipe, start: str, folder: Path) -> None:
    chat = Chat(load_tokenizer(start))
    path = recipe.path("token_rewards.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ArtefactWriter(path, Header("token_rewards", "c", tokenizer=chat.fingerprint)) as writer:
        for i in range(8):
            sides = {}
            for side, word, reward in (("chosen", "nice", 1.0), ("rejected", "rude", -1.0)):
                ids = [*chat.encode(f"something {word} today"), chat.tokenizer.eos_token_id]
                sides[side] = {"ids": ids, "rewards": [reward] * len(ids), "ended": True}
            split = "validation" if i % 4 == 0 else "train"
            prompt = chat.encode(f"the weather {i} ")
            writer.write([{"preference_id": f"p{i}", "split": split, "objective": "o", "prompt_ids": prompt, **sides}])
        writer.finish()


def made_by(folder: Path) -> tuple[bytes, str]:
    return (folder / "policy/model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


def late(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """A deadline that passed before this process's first step, as sections of a recipe."""
    monkeypatch.setattr(checkpoint, "STARTED", time.monotonic() - 60.0)
    return {"checkpointing": {"checkpoint_must_save_by": "00:00:00:30"}}


def test_a_deadline_saves_and_exits_and_the_same_command_ends_as_if_it_had_not(
    stage: Stage, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / stage.folder
    assert stage.run(recipe()) == folder / "policy"
    straight = made_by(folder)
    folder.rename(tmp_path / "straight")
    with monkeypatch.context() as patched:
        deadline = late(patched)
        for step in (1, 2, 3):  # every process gets one step further
            with pytest.raises(SystemExit) as caught:
                stage.run(recipe(**deadline))
            assert caught.value.code == 75
            assert checkpoint.steps(folder)[-1].name == f"step_{step:05d}"
            assert not (folder / "policy").exists()
        stage.run(recipe(**deadline))  # the last step needs no pause
    assert made_by(folder) == straight
    costs = [entry for entry in read_ledger(tmp_path / "run") if entry.get("steps")]
    assert [entry["steps"] for entry in costs] == [4, 1, 1, 1, 1]


def test_a_complete_run_returns_without_loading_a_model(
    stage: Stage,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = stage.run(recipe())
    before, costs = made_by(made.parent), read_ledger(tmp_path / "run")
    capsys.readouterr()

    def loaded(*given: Any, **named: Any) -> Any:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "load", loaded)
        assert stage.run(recipe()) == made
        assert "is complete, at step 4" in capsys.readouterr().out
        assert made_by(made.parent) == before and read_ledger(tmp_path / "run") == costs
        # it is not complete for who asks anew, asks for something else, or has lost a part of it
        with pytest.raises(AssertionError, match="a model was loaded"):
            stage.run(recipe(), fresh=True)
        with pytest.raises(AssertionError, match="a model was loaded"):
            stage.run(recipe(**{stage.section: {stage.steps: 5}}))
        (made / "model.safetensors").unlink()
        with pytest.raises(AssertionError, match="a model was loaded"):
            stage.run(recipe())
    stage.run(recipe())
    assert made_by(made.parent) == before


def test_a_wrong_deadline_is_refused_before_a_model_is_loaded(
    stage: Stage, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    with pytest.raises(InputError, match="DD:HH:MM:SS"):
        stage.run(recipe(checkpointing={"checkpoint_must_save_by": "1h"}))


def test_steps_have_their_seconds_and_the_cost_log_its_counts(
    stage: Stage, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = stage.run(recipe()).parent
    timing = [row for row in read_metrics(folder / "timing.jsonl") if row["step"] > 0]
    assert [row["step"] for row in timing] == [1, 2, 3, 4] and all(row["seconds"] > 0 for row in timing)
    entry = read_ledger(tmp_path / "run")[-1]
    assert entry["steps"] == 4
    assert entry["pairs"] == 12 if stage.section == "tfpo" else entry["tokens_trained"] > 4 * 3
