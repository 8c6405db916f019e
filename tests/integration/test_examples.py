"""The scripts under examples/ and the code in docs/python.md run as they are, on the small models of the other tests."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.recipes import ROOT

from nemo_pivotrl.components.simulation import load_simulator
from nemo_pivotrl.config import Recipe, Verifier
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers import load_verifier

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def example(name: str, monkeypatch: pytest.MonkeyPatch, **places: Path) -> None:
    for key, place in places.items():
        monkeypatch.setenv(key, str(place))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_pivotrl_on_a_list_of_trajectories(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example(
        "pivotrl.py",
        monkeypatch,
        MODEL=trained / "start/policy",
        TRAJECTORIES=trained / "world/trajectories.jsonl",
        RUN_DIR=tmp_path,
    )
    assert "pivot? True" in capsys.readouterr().out and (tmp_path / "pivotrl/policy/model.safetensors").exists()


def test_llmdoctor_on_two_models(
    steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PATIENT": steered / "patient/policy", "DOCTOR": steered / "novice/policy", "RUN_DIR": tmp_path}
    example("llmdoctor.py", monkeypatch, **places)
    answers = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in answers] == ["-1.0", "0.0", "1.0"]


def test_a_recipe_is_loaded_and_a_wrong_key_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out.splitlines() == ["0.6 runs/mine/pivots.jsonl", "did you mean `lambda_diff`?"]


def module_of(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code, vars(module))


def test_a_verifier_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of("my_verifiers", BLOCKS[1], monkeypatch)
    expected = Action("calls", calls=(ToolCall("Book", "{}"),))
    same, other = Action("calls", calls=(ToolCall("book", "{}"),)), Action("message", "book")
    verifier = load_verifier(Verifier(name="my_verifiers:SameTool", settings={"ignore_case": True}))
    assert [verifier.verify(Case(expected), actual).reward for actual in (same, other)] == [1.0, 0.0]


def test_a_simulator_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of("my_simulators", BLOCKS[2], monkeypatch)
    simulator = load_simulator(Recipe(), "evaluate.simulator", "my_simulators:counting")
    episode = simulator.start(simulator.tasks()[0])
    episode.step(Action("message", "Two?"))
    assert not episode.done
    episode.step(Action("message", "Three."))
    assert episode.done and episode.success and len(episode.messages) == 5
