"""Code of the user's own, by import path: verifiers, simulators, oracles."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl import config
from nemo_pivotrl.components.simulation import load_simulator
from nemo_pivotrl.config import Oracles, Recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.plugins import is_import_path, load_plugin
from nemo_pivotrl.core.types import Action, Case
from nemo_pivotrl.llmdoctor import oracles
from nemo_pivotrl.verifiers import load_verifier

MINE = """
from dataclasses import dataclass
from nemo_pivotrl.core.types import Action, Case, Verdict

@dataclass(frozen=True)
class SameFirstWord:
    ignore_case: bool = True
    name = "same_first_word"
    version = "1"
    concurrency = 1
    asks_judge = False

    def verify(self, case: Case, actual: Action) -> Verdict:
        words = [a.content.split()[:1] for a in (case.expected, actual)]
        if self.ignore_case:
            words = [[w.lower() for w in some] for some in words]
        return Verdict(float(words[0] == words[1]), "FIRST_WORD")

@dataclass
class Half:
    name = "half"

class Plain:
    pass

def shout(text): return float(text.isupper())
def bad(text): return float("nan")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_parts.py").write_text(MINE)
    (tmp_path / "my_broken.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_parts", None)


def test_a_verifier_of_ones_own_judges_with_its_settings(mine: Path) -> None:
    case, actual = Case(Action("message", "Yes please")), Action("message", "yes")
    verifier = load_verifier(config.Verifier(name="my_parts:SameFirstWord"))
    assert verifier.verify(case, actual).reward == 1
    strict = load_verifier(config.Verifier(name="my_parts:SameFirstWord", settings={"ignore_case": False}))
    assert strict.verify(case, actual).reward == 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_parts:Plain", "dataclass"),
        ("my_parts:Half", "version, concurrency, asks_judge, verify"),
        ("my_parts:Nobody", "it has"),
        ("my_partz:SameFirstWord", "PYTHONPATH"),
        ("functionall", "package.module:Class"),
    ],
)
def test_what_is_no_verifier_is_refused_with_the_remedy(mine: Path, path: str, said: str) -> None:
    with pytest.raises(InputError, match=r"verifier\.name") as error:
        load_verifier(config.Verifier(name=path))
    assert said in str(error.value)


def test_a_fault_inside_a_plugin_is_not_taken_for_a_missing_module(mine: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        load_plugin("my_broken:x", "f")


def test_an_oracle_of_ones_own_scores_and_must_be_finite(mine: Path) -> None:
    settings = Oracles(functions={"loud": "my_parts:shout", "broken": "my_parts:bad"})
    assert oracles.check("rank.objectives", ["loud", "kindness"], settings) == []
    (problem,) = oracles.check("rank.objectives", ["louder"], settings)
    assert "oracles.functions" in problem.remedy
    assert oracles.load(["loud"], settings)["loud"]([[], []], ["HI", "hi"]) == [1.0, 0.0]
    with pytest.raises(InputError, match="finite"):
        oracles.load(["broken"], settings)


def test_the_demo_comes_through_the_same_door() -> None:
    recipe = Recipe()
    by_name = load_simulator(recipe, "evaluate.simulator", "world")
    by_path = load_simulator(recipe, "evaluate.simulator", "nemo_pivotrl.demo.simulators:service_desk")
    assert by_name.tasks() == by_path.tasks() and len(by_name.tasks()) == recipe.world.test_tasks
    episode = by_name.start(by_name.tasks()[0])
    episode.step(Action("malformed"))
    assert episode.done and not episode.success and episode.turns == 1
    puzzles = load_simulator(dataclasses.replace(recipe, seed=3), "evaluate.retention", "world")
    assert not puzzles.start(puzzles.tasks()[0]).tools


def test_the_form_of_an_import_path() -> None:
    assert is_import_path("a.b_c:D.e") and is_import_path("a:b")
    assert not any(map(is_import_path, ("a", "a.b", "C:\\x.jsonl", "http://h:80", "runs/a:b", "a:", ":b", "a b:c")))
