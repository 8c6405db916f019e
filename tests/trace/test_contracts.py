"""What the releases of megatron-core and Transformer Engine that we may meet share with us: names, checkpoints, FP8's rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
from names import Taken, taken, there
from traced import BESIDE, GPU_RECIPES, LLMDOCTOR, PIVOTRL, ROOT, SOURCES, environment, run, with_engine

IMAGES = "2.15.0"
ENGINES = {
    "2.11.0": BESIDE / "transformer-engine==2.11.0",
    IMAGES: SOURCES,
    "2.20.2": BESIDE / "transformer-engine==2.20.2",
}
"""Transformer Engine: the newest that megatron-core 0.16 asks for, the release image's, and the newest."""
NEWEST = BESIDE / "megatron-core==0.19.2"
CORES = {"0.16.1": Path(megatron.core.__path__[0]), "0.19.2": NEWEST / "megatron/core"}
HYBRID = PIVOTRL / "pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml"
MIXTURE = PIVOTRL / "pivotrl-qwen3-30b-a3b-thinking-16n8g-tp2pp2cp4ep8-swe.yaml"
DENSE = PIVOTRL / "pivotrl-qwen3-8b-1n8g-tp2-conversational.yaml"
DENSE_FP8 = PIVOTRL / "pivotrl-qwen3-8b-1n8g-tp2-conversational-fp8.yaml"


SWITCH, SWITCHED = "use_transformer_engine_op_fuser", "transformer_engine.pytorch.ops."
"""megatron-core takes names of this module where this field of its configuration, which we leave alone, is set."""


def missing(root: Path, engine: Path) -> tuple[list[Taken], list[Taken]]:
    """(names taken from Transformer Engine that this release of it lacks, those of them that nothing guards)."""
    lacking = [t for t in taken(root, "transformer_engine") if not there(engine, t.name)]
    return lacking, [t for t in lacking if not t.guarded]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("core", CORES)
def test_what_megatron_core_takes_from_transformer_engine_is_there_or_guarded(core: str, engine: str) -> None:
    found = taken(CORES[core], "transformer_engine")
    lacking, bare = missing(CORES[core], ENGINES[engine])
    print(
        f"\nmegatron-core {core}, Transformer Engine {engine}: {len(found)} names, {len(lacking)} guarded ones missing"
    )
    assert len(found) > 60 and [t for t in bare if not t.name.startswith(SWITCHED)] == []
    config = (CORES[core] / "transformer/transformer_config.py").read_text(encoding="utf-8")
    assert SWITCH not in config or f"{SWITCH}: bool = False" in config
    assert not any(SWITCH in path.read_text(encoding="utf-8") for path in (ROOT / "nemo_pivotrl").rglob("*.py"))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_we_take_from_transformer_engine_is_there(engine: str) -> None:
    found = taken(ROOT / "nemo_pivotrl", "transformer_engine")
    assert found and missing(ROOT / "nemo_pivotrl", ENGINES[engine])[0] == []


def test_a_name_that_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import transformer_engine as te\nfrom transformer_engine.pytorch import Linear, Nothing\n"
        "try:\n    from transformer_engine.pytorch import Later\nexcept ImportError:\n    Later = None\n"
        "te.pytorch.RMSNorm\nte.pytorch.Absent\nif te.__version__ > '9':\n    te.common.Gone\n"
    )
    lacking, bare = missing(tmp_path, SOURCES)
    assert [t.name.rpartition(".")[2] for t in lacking] == ["Nothing", "Later", "Absent", "Gone"]
    assert [t.name.rpartition(".")[2] for t in bare] == ["Nothing", "Absent"]


@pytest.mark.parametrize(
    ("recipe", "layers", "engine", "core"),
    [
        (DENSE_FP8, "DDDDDD", "2.11.0", "0.16.1"),
        pytest.param(HYBRID, "ME*E", "2.11.0", "0.16.1", marks=pytest.mark.full),
        pytest.param(DENSE, "DDDD", "2.20.2", "0.16.1", marks=pytest.mark.full),
        (HYBRID, "ME*E", IMAGES, "0.19.2"),
        (MIXTURE, "EEEE", IMAGES, "0.19.2"),
        pytest.param(DENSE_FP8, "DDDDDD", IMAGES, "0.19.2", marks=pytest.mark.full),
        (DENSE, "DDDD", "2.20.2", "0.19.2"),
    ],
    ids=lambda v: v.stem[8:] if isinstance(v, Path) else str(v),
)
def test_a_step_runs_over_other_releases(recipe: Path, layers: str, engine: str, core: str, tmp_path: Path) -> None:
    """Its memory is `plan`'s, FP8's rules hold, and the checkpoint has every parameter."""
    sources = with_engine(ENGINES[engine], tmp_path)
    found = run(recipe, layers=layers, sources=sources, core=None if core == "0.16.1" else NEWEST)
    assert found.answer, found.error[-3000:]
    versions = found.answer["traced"]["versions"]
    found_core = versions["megatron_core"].partition("+")[
        0
    ]  # some releases add the commit of the checkout that they lie in
    assert (versions["transformer_engine"], found_core) == (engine, core)
    assert (found.off(), found.answer["traced"]["broken_fp8"], found.answer["traced"]["unmapped"]) == ([], [], [])


def test_fp8s_rules_and_ours_say_the_same_of_every_recipe() -> None:
    """Transformer Engine's own assertion over every matrix that a rank of each recipe would multiply in FP8."""
    program = [sys.executable, str(Path(__file__).with_name("fp8_rules.py")), *map(str, GPU_RECIPES)]
    found = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    told = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["recipe"] for row in told] == [recipe.stem for recipe in GPU_RECIPES]
    for row in told:
        assert row["matrices"] > 3 and bool(row["engine_refuses"]) == bool(row["we_refuse"]), row
    assert any(row["recipe"].endswith("fp8") and not row["we_refuse"] for row in told)


def test_fp8s_rules_are_broken_where_a_layout_cuts_a_matrix_too_thin() -> None:
    recipe = LLMDOCTOR / "llmdoctor-tulu-2-70b-1n8g-tp8-ultrafeedback.yaml"
    program = [sys.executable, str(Path(__file__).with_name("fp8_rules.py")), "--width", "1032", str(recipe)]
    found = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    row = json.loads(found.stdout)
    assert row["engine_refuses"] and row["we_refuse"], row
