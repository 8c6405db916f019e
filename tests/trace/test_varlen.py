"""Kernels for packed sequences over shared prefixes: calls against their libraries' sources, and slices of training steps."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from test_contracts import ENGINES
from traced import PIVOTRL, ROOT, SOURCES, run

SPEC = importlib.util.spec_from_file_location("varlen_libraries", ROOT / "tests/support/varlen_libraries.py")
assert SPEC is not None and SPEC.loader is not None
emulated: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulated)

HYBRID = PIVOTRL / "pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml"
DENSE = PIVOTRL / "pivotrl-qwen3-8b-1n8g-tp2-conversational.yaml"
FLASH_2, FLASH_3 = SOURCES / "flash_attn/flash_attn_interface.py", SOURCES / "flash_attn_interface.py"
FUSED = "transformer_engine/pytorch/cpp_extensions/fused_attn.py"
EARLY = "dqkv_dtype"
"""Asked for by Transformer Engine before 2.15, which has no formats of outputs and gradients; `TransformerEngine` looks."""
KNOWN = [
    *((FLASH_2, name) for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")),
    *((FLASH_3, name) for name in ("_flash_attn_forward", "_flash_attn_backward")),
    *((engine / FUSED, name) for engine in ENGINES.values() for name in ("fused_attn_fwd", "fused_attn_bwd")),
]


def signature(path: Path, name: str) -> tuple[list[str], int]:
    """(names of a function's arguments in their order, how many of them have no default)."""
    (found,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    names = [a.arg for a in found.args.args]
    return names, len(names) - len(found.args.defaults)


@pytest.mark.parametrize(("path", "name"), KNOWN, ids=lambda v: v.parts[-5] if isinstance(v, Path) else v)
def test_the_emulation_takes_the_arguments_of_the_library(path: Path, name: str) -> None:
    names, needed = signature(path, name)
    ours = inspect.signature(getattr(emulated, name)).parameters
    placed = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    later = {"o_format", "do_format", "dqkv_layout"} if "fused" in name and "o_format" not in names else set()
    assert placed == [n for n in names if n != EARLY][: len(placed)] and set(ours) - set(names) == later & set(ours)
    assert set(names[:needed]) - set(ours) <= {EARLY}


def test_pytorchs_operators_are_what_its_own_varlen_attention_calls() -> None:
    text = inspect.getsource(torch.nn.attention.varlen)
    assert "aten._flash_attention_forward(" in text and "aten._flash_attention_backward(" in text
    for name in ("forward", "backward"):
        schema = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema
        ours = [p for p in inspect.signature(getattr(emulated, f"aten_{name}")).parameters if p != "_"]
        given = [a.name.removeprefix("self") for a in schema.arguments if not a.kwarg_only] + ["scale"]
        assert ours == given


@pytest.mark.parametrize("form", ["torch", "flash_attn_2", "flash_attn_3", "transformer_engine"])
@pytest.mark.parametrize(("recipe", "layers"), [(HYBRID, "M*M*"), (DENSE, "DDDDDD")], ids=["hybrid", "dense"])
def test_a_step_runs_over_every_librarys_own_python(recipe: Path, layers: str, form: str) -> None:
    found = run(recipe, f"policy.prefix_attention={form}", layers=layers)
    assert found.answer, found.error[-3000:]
    traced = found.answer["traced"]
    calls = {name: n for name, n in traced["kernels"].items() if name.startswith(f"{form} attention")}
    attended = traced["attention"][f"{form} over shared prefixes"]
    forward, backward = calls[f"{form} attention"], calls[f"{form} attention, backward"]
    assert forward == 2 * backward and forward > attended  # computed again in the backward pass; squares and forks
    assert traced["attention"].keys() == {f"{form} over shared prefixes"}
    assert "at most, all together" not in found.off()


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "2.15.0"])
def test_other_releases_of_transformer_engine_take_the_same_call(engine: str, tmp_path: Path) -> None:
    from traced import with_engine

    sources = with_engine(ENGINES[engine], tmp_path)
    found = run(DENSE, "policy.prefix_attention=transformer_engine", layers="DD", sources=sources)
    assert found.answer, found.error[-3000:]
    assert found.answer["traced"]["attention"].keys() == {"transformer_engine over shared prefixes"}
