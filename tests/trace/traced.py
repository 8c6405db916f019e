"""Traces in processes of their own, since a trace replaces parts of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(os.environ.get("NEMO_PIVOTRL_TRACE_SOURCES") or ROOT / ".trace").resolve()
BESIDE = SOURCES / "beside"
"""Other releases, each in a folder `NAME==VERSION`."""
PIVOTRL, LLMDOCTOR = ROOT / "recipes/pivotrl", ROOT / "recipes/llmdoctor"
GPU_RECIPES = sorted([*PIVOTRL.glob("*8g*.yaml"), *LLMDOCTOR.glob("llmdoctor-*8g*.yaml")])
"""Those that train on megatron-core."""


def slice_of(recipe: Path) -> str:
    """A few layers of every kind that the recipe's model has; beyond the outer two on either side, which FP8 leaves out."""
    if "nano" in recipe.stem or "llmdoctor-nemotron" in recipe.stem:
        return "M*-M"
    if "nemotron" in recipe.stem:
        return "MEM*ME"
    return "EEEEEE" if "30b" in recipe.stem else "DDDDDD"


def ranks_of(recipe: Path) -> list[int]:
    """A rank of the first pipeline stage, and one of the last."""
    return [0, 32] if "pp2" in recipe.stem else [0]


@dataclass(frozen=True)
class Ran:
    code: int
    answer: dict[str, Any]
    """What `--json` printed; empty where it printed none."""
    error: str

    def off(self) -> list[str]:
        """Names of the figures that `plan` misses, and of what is not fused."""
        figures = [line["name"] for line in self.answer["lines"] if not line["close"]]
        return figures + [name for name, state in self.answer["fusions"].items() if state == "OFF"]


def environment(sources: Path = SOURCES, core: Path | None = None) -> dict[str, str]:
    """Of a trace's process. core: a folder with another megatron-core than the installed one."""
    return {
        **os.environ,
        "NEMO_PIVOTRL_TRACE_SOURCES": str(sources),
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *([core] if core else [])])),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }


def with_engine(engine: Path, folder: Path) -> Path:
    """Sources in `folder` with another release of Transformer Engine."""
    for place in (SOURCES / "mamba_ssm", SOURCES / "causal_conv1d", *engine.glob("transformer_engine*")):
        (folder / place.name).symlink_to(place)
    return folder


def run(
    recipe: Path,
    *arguments: str,
    layers: str | None = None,
    rank: int = 0,
    mutant: str = "",
    sources: Path = SOURCES,
    core: Path | None = None,
) -> Ran:
    """`nemo-pivotrl trace` with the optimiser's step; mutant: one of `mutant.py`."""
    program = [str(Path(__file__).with_name("mutant.py")), mutant] if mutant else ["-m", "nemo_pivotrl.cli"]
    pattern = slice_of(recipe) if layers is None else layers
    chosen = [f"--layers={pattern}"] if pattern else []
    command = [
        sys.executable,
        *program,
        "trace",
        str(recipe),
        *arguments,
        *chosen,
        f"--rank={rank}",
        "--optimizer",
        "--json",
    ]
    own = environment(sources, core)
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own, check=False)
    start = found.stdout.find("{")
    return Ran(found.returncode, json.loads(found.stdout[start:]) if start >= 0 else {}, found.stderr)
