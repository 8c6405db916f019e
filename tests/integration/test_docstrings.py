"""The example in the docstring of every public name runs as it stands, on the small runs of the other tests."""

import dataclasses
import doctest
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.recipes import ROOT, SMALL, SMALL_LLMDOCTOR

import nemo_pivotrl
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.config.show import to_yaml

NEEDS_MODELS = ("GuidedGenerator", "GuidedLogitsProcessor")


class Printing(doctest.OutputChecker):
    """A line without an expected result may print: stages do."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def folder(trained: Path, steered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples run: `recipe.yaml` and `llmdoctor.yaml` of runs whose first stages are done, and `prompts.jsonl`."""
    made = tmp_path_factory.mktemp("docstrings")
    for name, run, sizes in (("recipe", trained, SMALL), ("llmdoctor", steered, SMALL_LLMDOCTOR)):
        source = ROOT / "recipes" / ("llmdoctor" if name == "llmdoctor" else "pivotrl") / "tiny.yaml"
        shutil.copytree(run, made / name)
        own = load_recipe(str(source), [f"run_dir={made / name}", *sizes])
        policies = {"base": own.policy.model_name}  # the others are not trained here
        own = dataclasses.replace(own, evaluate=dataclasses.replace(own.evaluate, policies=policies))
        (made / f"{name}.yaml").write_text(to_yaml(own, changed=True), encoding="utf-8")
    shutil.copy(steered / "manners/test.jsonl", made / "prompts.jsonl")
    return made


def models(run: Path) -> dict[str, Any]:
    """A patient, a doctor and their tokenizer, as the examples name them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    patient, doctor = (AutoModelForCausalLM.from_pretrained(run / name / "policy") for name in ("patient", "novice"))
    tokenizer = AutoTokenizer.from_pretrained(run / "patient/policy")
    guided = nemo_pivotrl.GuidedGenerator(patient, {"kind": doctor}, tokenizer)
    return {
        "patient": patient,
        "doctor": doctor,
        "patient_tokenizer": tokenizer,
        "guided": guided,
        "LogitsProcessorList": LogitsProcessorList,
    }


@pytest.mark.parametrize("name", nemo_pivotrl.__all__)
def test_the_example_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = inspect.unwrap(getattr(nemo_pivotrl, name))
    known = {n: getattr(nemo_pivotrl, n) for n in nemo_pivotrl.__all__} | {"nemo_pivotrl": nemo_pivotrl}
    known = vars(sys.modules["nemo_pivotrl.core.types"]) | vars(sys.modules[found.__module__]) | known
    if name in NEEDS_MODELS:
        known |= models(folder / "llmdoctor")
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(found) or "", known, name, inspect.getsourcefile(found), 0
    )
    assert test.examples, f"{name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(Printing(), verbose=False).run(test, out=printed.append)
    assert not result.failed, "".join(printed)
