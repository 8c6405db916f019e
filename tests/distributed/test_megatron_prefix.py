"""A step over shared prefixes is the step over whole rows: loss and every gradient in float64, layout by layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
from support.workers import Workers

EXACT = 1e-12
TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, {}),
    "w1 full recompute": (1, {"recompute": "full"}),
    "w1 selective recompute": (1, {"recompute": "selective"}),
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, "sequence_parallel": True}),
    "tp4+sp": (4, {TP: 4, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "cp2 x tp2": (4, {CP: 2, TP: 2, "sequence_parallel": True}),
    "cp2 x ep2": (2, {CP: 2, EP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
}
# (seed of the tree, tokens of a micro-batch): all rows in one, or a few of them in each
RUNS = [(0, 10**4), (1, 10**4), (1, 60), (2, 60)]
ONE_RANKS_RUNS = [*RUNS, (3, 10**4), (4, 10**4), (4, 60), (5, 60)]
CASES = [
    *(("grpo", "qwen3", layout) for layout in LAYOUTS if "ep2" not in layout),
    *(("tfpo", "qwen3", layout) for layout in ("w1", "tp2+sp", "pp2")),
    *(("tfpo", name, "w1") for name in ("qwen3_moe", "nemotron_h")),
    *(("grpo", "qwen3_moe", layout) for layout in ("w1", "tp2+sp", "pp2", "ep2", "cp2 x ep2")),
    *(
        ("grpo", "nemotron_h", layout)
        for layout in ("w1", "w1 full recompute", "tp2+sp", "pp2", "ep2", "cp2", "cp2 x tp2")
    ),
    ("grpo", "llama_tied", "pp2"),
]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> str:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, made[name])
        return str(made[name])

    return get


@pytest.mark.parametrize(("kind", "name", "layout"), CASES)
def test_shared_and_whole_rows_give_one_gradient(
    workers: Workers, folder_of: Any, kind: str, name: str, layout: str
) -> None:
    ranks, settings = LAYOUTS[layout]
    arguments = {"folder": folder_of(name), "layout": settings, "kind": kind}
    answers = workers.run(ranks, "prefix_jobs:both", runs=ONE_RANKS_RUNS if ranks == 1 else RUNS, **arguments)
    largest = 0.0
    for answer in answers:
        for loss, apart, worst, size, few, many in answer:
            largest = max(largest, apart)
            assert loss <= EXACT and apart <= EXACT, worst
            assert size > 1e-4
            if ranks == 1:
                assert few < many
    print(f"\n{kind:6}{name:12}{layout:24}{largest:.1e}")


KERNELS = [
    ("qwen3", "w1 full recompute", "flash_attn_2"),
    ("qwen3", "cp2", "transformer_engine"),
    ("nemotron_h", "cp2", "torch"),
    ("qwen3_moe", "cp2 x ep2", "flash_attn_3"),
]


@pytest.mark.parametrize(("name", "layout", "form"), KERNELS)
def test_kernels_for_packed_sequences_give_the_same_gradient(
    workers: Workers, folder_of: Any, name: str, layout: str, form: str
) -> None:
    ranks, settings = LAYOUTS[layout]
    arguments = {"folder": folder_of(name), "layout": settings, "kind": "grpo", "form": form}
    for answer, calls in workers.run(ranks, "prefix_jobs:by_kernel", runs=RUNS, **arguments):
        assert calls > 0
        for loss, apart, worst, size, *_ in answer:
            assert loss <= EXACT and apart <= EXACT and size > 1e-4, worst


@pytest.mark.parametrize(
    ("name", "harm"), [("qwen3", "offset"), ("qwen3", "positions"), ("qwen3", "first"), ("nemotron_h", "state")]
)
def test_mistakes_one_could_make_are_found(workers: Workers, folder_of: Any, name: str, harm: str) -> None:
    arguments = {"folder": folder_of(name), "layout": {}, "kind": "grpo", "harm": harm}
    (answer,) = workers.run(1, "prefix_jobs:both", runs=[(0, 10**4), (1, 10**4)], **arguments)
    assert all(apart > 1e-4 for _, apart, *_ in answer)
