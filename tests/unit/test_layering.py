"""Who may import whom: records <- algorithms <- stages -> backends. Read from the source, whether a line runs or not."""

import ast
import sys
from pathlib import Path

import pytest
from support.recipes import ROOT

PACKAGE = ROOT / "nemo_pivotrl"
FILES = sorted(PACKAGE.rglob("*.py"))
ACCELERATOR_STACKS = {"vllm", "megatron", "nemo", "nemo_aligner", "transformer_engine"}

SHARED = {"nemo_pivotrl.backends.forest_attention", "nemo_pivotrl.backends.forest_mamba"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p) for p in FILES}


def imports(path: Path, source: str | None = None) -> set[str]:
    """Every module `path` imports, at its top or inside a function, for types or at run time."""
    found: set[str] = set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES
            found |= submodules | ({base} if len(submodules) < len(node.names) else set())
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(node.args[0].value)
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("nemo_pivotrl")}


def test_the_reader_of_imports_sees_them_wherever_they_stand() -> None:
    source = "import vllm.x\ndef f():\n    from nemo_pivotrl import pivotrl, __version__\n    from . import ledger\n"
    source += "    __import__('nemo')"
    assert imports(PACKAGE / "stages/extract.py", source) == {
        "vllm.x",
        "nemo_pivotrl",
        "nemo_pivotrl.pivotrl",
        "nemo_pivotrl.stages.ledger",
        "nemo",
    }
    assert imports(PACKAGE / "backends/reference.py") >= {"torch", "nemo_pivotrl.backends", "nemo_pivotrl.config"}


def test_records_imports_only_the_standard_library() -> None:
    assert tops(PACKAGE / "records.py") <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [n for n in ("pivotrl.py", "llmdoctor.py", "prefix.py") if (PACKAGE / n).exists()])
def test_an_algorithm_file_imports_only_torch_the_standard_library_and_records(name: str) -> None:
    assert tops(PACKAGE / name) - sys.stdlib_module_names <= {"torch", "nemo_pivotrl"}
    assert ours(PACKAGE / name) <= {"nemo_pivotrl.records"}


def test_curtailment_adds_nothing_but_the_rule_it_curtails() -> None:
    assert tops(PACKAGE / "curtailment.py") - sys.stdlib_module_names == {"scipy", "nemo_pivotrl"}
    assert ours(PACKAGE / "curtailment.py") == {"nemo_pivotrl.pivotrl"}


def test_backends_import_neither_stages_nor_algorithms_nor_each_other() -> None:
    for path in (PACKAGE / "backends").glob("*.py"):
        allowed = {"nemo_pivotrl.backends", "nemo_pivotrl.config", "nemo_pivotrl.records", "nemo_pivotrl.prefix"}
        allowed.add("nemo_pivotrl.backends.sampling")  # the arithmetic that all samplers share; itself no backend
        allowed |= SHARED  # layers over a forest of shared prefixes; themselves no backend
        if "_" in path.stem.strip("_"):  # reference_doctor.py is a part of the backend reference.py
            allowed.add(f"nemo_pivotrl.backends.{path.stem.partition('_')[0]}")
        if path.stem.startswith("vllm"):
            # one backend in several files; it brings its own proof of a refit, and takes the reference's arithmetic of guided
            # decoding, so that a doctor inside the engine is the same doctor
            allowed |= {name for name in MODULES if name.startswith("nemo_pivotrl.backends.vllm")}
            if path.stem in ("vllm_doctors", "vllm_decode", "vllm_guide"):
                allowed |= {f"nemo_pivotrl.backends.{n}" for n in ("doctors", "guided")} | {"nemo_pivotrl.llmdoctor"}
        if path.name.startswith(("reference", "scorer")):  # both run transformers' models, over forests, too
            allowed.add("nemo_pivotrl.backends.reference_forest")
        if path.name in ("doctors.py", "guided.py"):
            # guided decoding *is* the mixture applied at every step, so its loop calls the pure functions of the
            # algorithm's file; a loss can be handed to a backend as an argument, a step of a KV-cached loop cannot.
            # The two files are one backend, cut where the models end and the sampling begins.
            allowed |= {"nemo_pivotrl.llmdoctor", "nemo_pivotrl.backends.doctors"}
        if path.name == "__init__.py":  # `load` imports the backend that a recipe names
            allowed |= {name for name in MODULES if name.startswith("nemo_pivotrl.backends.")}
        assert ours(path) <= allowed, path.name


def test_only_backends_import_the_accelerator_stacks() -> None:
    offenders = {module_of(p): tops(p) & ACCELERATOR_STACKS for p in FILES if PACKAGE / "backends" not in p.parents}
    assert {name: found for name, found in offenders.items() if found} == {}


def test_what_asks_servers_needs_no_vllm() -> None:
    for name in ("vllm_requests.py", "vllm_servers.py", "vllm_refit.py", "vllm_doctors.py", "vllm_streams.py"):
        assert "vllm" not in tops(PACKAGE / "backends" / name), name


def test_the_megatron_backend_imports_no_stage_no_algorithm_and_no_other_backend() -> None:
    for path in (PACKAGE / "backends/megatron").glob("*.py"):
        allowed = {"nemo_pivotrl.backends", "nemo_pivotrl.config", "nemo_pivotrl.records"}
        allowed |= SHARED | {"nemo_pivotrl.backends.sampling", "nemo_pivotrl.prefix"}
        others = {name for name in ours(path) if not name.startswith("nemo_pivotrl.backends.megatron")}
        assert others <= allowed, path.name


def test_what_stands_below_the_stages_does_not_import_them() -> None:
    for name in (
        "config.py",
        "readers.py",
        "preferences.py",
        "faces.py",
        "responses.py",
        "chat.py",
        "world.py",
        "tiny.py",
        "verifiers/__init__.py",
        "verifiers/single_step.py",
    ):
        assert not {
            m for m in ours(PACKAGE / name) if m.startswith(("nemo_pivotrl.stages", "nemo_pivotrl.backends"))
        }, name
