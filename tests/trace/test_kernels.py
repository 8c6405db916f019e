"""Triton kernels without a GPU: they fit a GPU's shared memory, and their numbers are those of plain torch.

mamba_ssm's chunk scan, and FlexAttention as Inductor writes it for the mask of shared prefixes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from traced import BESIDE, ROOT, SOURCES, environment

SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper (9.0) and Blackwell (10.0): CUDA's table of compute capabilities."""
FORWARD = ("_chunk_cumsum_fwd_kernel", "_state_passing_fwd_kernel", "_bmm_chunk_fwd_kernel")
ALL = 13
"""Kernels of a scan with states in and out, forward and backward, at least."""
CLOSE = 3e-6
"""Of the largest number, in float32."""


def told(command: str, *arguments: str, file: str = "kernels.py", **more: str) -> list[dict[str, Any]]:
    """What a command prints."""
    own = environment() | {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(SOURCES / "triton-cache"))} | more
    own["PYTHONPATH"] = os.pathsep.join([own["PYTHONPATH"], *map(str, BESIDE.glob("triton==*"))])
    place = [str(SOURCES)] if file == "kernels.py" else []
    program = [sys.executable, str(Path(__file__).with_name(file)), command, *place, *arguments]
    found = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=own, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def fit(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"\nsm_{row['capability']} {row['kernel']:45}{row['shared']:9,} B shared", end="")
        assert row["bytes"] > 1000 and row["shared"] <= SHARED and f"sm_{row['capability']}" in row["target"], row


def test_kernels_of_a_forward_pass_fit_hopper_and_blackwell() -> None:
    rows = told("compile", "90,100", *FORWARD)
    assert [(row["capability"], row["kernel"]) for row in rows] == [(c, name) for c in (90, 100) for name in FORWARD]
    fit(rows)


@pytest.mark.full
def test_all_kernels_fit_hopper_and_blackwell() -> None:
    rows = told("compile", "90,100")
    assert len(rows) >= 2 * ALL and any("bwd" in row["kernel"] for row in rows)
    fit(rows)


def exact(trees: int, lengths: tuple[int, ...]) -> None:
    rows = told("numbers", str(trees), *map(str, lengths), TRITON_INTERPRET="1")
    assert [row["length"] for row in rows if "length" in row] == list(lengths)
    assert len({row["tokens"] for row in rows if "tree" in row}) >= min(trees, 2) and len(rows) == trees + len(lengths)
    assert all(row["pieces"] > 3 for row in rows if "tree" in row)
    for row in rows:
        assert len(row["off"]) >= 3 and all(off < CLOSE for off in row["off"].values()), row


def test_numbers_of_the_kernels_are_the_twins() -> None:
    exact(trees=1, lengths=(18,))


@pytest.mark.full
def test_numbers_of_the_kernels_over_many_trees_are_the_twins() -> None:
    exact(trees=12, lengths=(1, 5, 16, 37, 64))


# ---- FlexAttention over shared prefixes ----


def flex(command: str, *arguments: str, **more: str) -> list[dict[str, Any]]:
    return told(command, *arguments, file="flex.py", **more)


COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ makes two lines that torch's build for CPUs lacks"
)


@COMPILER
@pytest.mark.parametrize("capability", [90, pytest.param(100, marks=pytest.mark.full)])
def test_flex_attention_of_our_mask_fits_hopper_and_blackwell(capability: int, tmp_path: Path) -> None:
    rows = flex("compile", str(capability), str(tmp_path))
    assert [row["kernel"] for row in rows] == ["flex_attention forward", "flex_attention backward"]
    assert all(row["tensor cores"] == [{90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]] for row in rows)
    fit(rows)


@COMPILER
@pytest.mark.parametrize("trees", [1, pytest.param(12, marks=pytest.mark.full)])
def test_numbers_of_flex_attention_are_those_of_all_pairs(trees: int, tmp_path: Path) -> None:
    rows = flex("numbers", str(tmp_path), str(trees), TRITON_INTERPRET="1")
    assert len(rows) == trees and any(row["full"] for row in rows)
    for row in rows:
        assert row["off"].keys() == {"out", "of q", "of k", "of v"}
        assert all(off < CLOSE for off in row["off"].values()), row
