"""The public API: which names there are, that they cost nothing until they are used, and what their signatures are."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_pivotrl

SIGNATURES = Path(__file__).with_name("api.txt")
RENEW = "python tests/unit/test_api.py"


def signatures() -> str:
    """A line for each public function, with its parameters."""
    functions = {n: getattr(nemo_pivotrl, n) for n in nemo_pivotrl.__all__}
    return "".join(f"{n}{inspect.signature(f)}\n" for n, f in functions.items() if inspect.isfunction(f))


def test_the_names_are_sorted_and_all_of_them_are_there() -> None:
    assert nemo_pivotrl.__all__ == sorted(nemo_pivotrl.__all__)
    assert set(nemo_pivotrl.__all__) == set(nemo_pivotrl._HOME) <= set(dir(nemo_pivotrl))
    for name in nemo_pivotrl.__all__:
        assert inspect.getdoc(getattr(nemo_pivotrl, name)), name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        nemo_pivotrl.nothing_of_the_kind  # noqa: B018


def test_importing_the_package_and_loading_a_recipe_need_no_torch() -> None:
    code = "import sys, nemo_pivotrl; nemo_pivotrl.load_recipe, nemo_pivotrl.Problem, nemo_pivotrl.Verdict\n"
    code += "nemo_pivotrl.load_verifier; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_signatures_are_the_ones_that_were_agreed_on() -> None:
    assert signatures() == SIGNATURES.read_text(encoding="utf-8"), f"users call these; if it is meant: {RENEW}"


def test_old_module_names_go_on_working_and_say_what_they_are_now() -> None:
    with pytest.warns(DeprecationWarning, match=r"nemo_pivotrl\.records is now nemo_pivotrl\.core\.errors"):
        from nemo_pivotrl.records import Action, InputError, read_rows
    from nemo_pivotrl.core.artifacts import read_rows as now

    assert InputError is nemo_pivotrl.InputError and read_rows is now and Action("message", "x").content == "x"
    with pytest.warns(DeprecationWarning, match="components.rollout"):
        from nemo_pivotrl.stages.rollout import load_chat  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nemo_pivotrl.stages.nobody")


if __name__ == "__main__":
    SIGNATURES.write_text(signatures(), encoding="utf-8")
