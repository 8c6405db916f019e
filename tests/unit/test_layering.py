"""The import rule of the house: a file imports from its own room and from rooms before it, and no files form a circle.

Read from the source, at the top of a file or inside a function, whether a line runs or not.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_pivotrl"
ROOMS = "core, config, algorithms sizing, data backends, verifiers, components, "
ROOMS += "pivotrl llmdoctor tools, report demo, pipeline cli, integrations"
RANK = {room: rank for rank, rooms in enumerate(ROOMS.split(", ")) for room in rooms.split()}
WITHOUT_TORCH = ("core", "config", "sizing", "data", "cli")
STACKS = {"vllm", "megatron", "nemo", "nemo_aligner", "transformer_engine", "mamba_ssm", "ray"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    """The package's files, by the names of their modules."""
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that `tree` imports; a module of the package by its own name, also where it stands behind `import`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in sources() else node.module


def room(module: str) -> str:
    return module.split(".")[1]


@cache
def ours() -> dict[str, set[str]]:
    """What each file imports from the package."""
    return {name: {m for m in imports(tree) if m in sources()} - {"nemo_pivotrl"} for name, tree in sources().items()}


def test_a_file_imports_from_its_own_room_and_from_rooms_before_it() -> None:
    inner = {name: modules for name, modules in ours().items() if name != "nemo_pivotrl"}  # whose names are lazy
    assert {room(name) for name in inner} == set(RANK)
    assert [
        f"{name} imports {module}"
        for name, modules in inner.items()
        for module in sorted(modules)
        if room(module) != room(name) and RANK[room(module)] >= RANK[room(name)]
    ] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(ours()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_accelerator_stacks_are_imported_by_backends_and_integrations_alone() -> None:
    for name, tree in sources().items():
        if name != "nemo_pivotrl" and room(name) not in ("backends", "integrations"):
            assert not {module.partition(".")[0] for module in imports(tree)} & STACKS, name


def test_core_config_sizing_data_and_the_command_line_need_no_torch() -> None:
    for name, tree in sources().items():
        if name != "nemo_pivotrl" and room(name) in WITHOUT_TORCH:
            top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
            assert not {m.partition(".")[0] for m in imports(top)} & {"torch", "transformers"}, name


def test_core_imports_only_the_standard_library() -> None:
    for name, tree in sources().items():
        if name.startswith("nemo_pivotrl.core"):
            assert {m.partition(".")[0] for m in imports(tree)} - sys.stdlib_module_names <= {"nemo_pivotrl"}, name
