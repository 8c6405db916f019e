"""HF checkpoints in Megatron: transformers' own logits under every layout, and every tensor back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
from distributed_harness import Workers

TP, PP, CP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "context", "expert"))
CP = "context_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "cp2": (2, {CP: 2}),
    "ep2 allgather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2 alltoall": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "tp2 x cp2": (4, {TP: 2, CP: 2, "sequence_parallel": True}),
    "pp2 x ep2": (4, {PP: 2, EP: 2}),
    "tp2 x ep2": (4, {TP: 2, EP: 2, "sequence_parallel": True}),
}
DENSE = ["w1", "tp2", "tp2+sp", "pp2", "cp2", "tp2 x pp2"]
SPARSE = ["w1", "tp2+sp", "pp2", "cp2", "ep2 allgather", "ep2 alltoall", "tp2 x pp2", "pp2 x ep2", "tp2 x ep2"]
CASES = [
    *((name, layout) for name in ("llama", "llama_tied", "qwen3") for layout in DENSE),
    ("llama", "tp2 x cp2"),
    ("qwen2", "tp2"),
    *(("qwen3_moe", layout) for layout in SPARSE),
    ("qwen3_moe_unnormalised", "ep2 alltoall"),
    *(("nemotron_h", layout) for layout in SPARSE if "cp2" not in layout),
    ("nemotron_h_groups", "tp2 x ep2"),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, self[name])
            return self[name]

    return Made()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_are_those_of_transformers_and_every_tensor_comes_back(
    workers: Workers, checkpoints: dict[str, Path], name: str, layout: str
) -> None:
    ranks, settings = LAYOUTS[layout]
    answers = workers.run(ranks, "model_jobs:compare", folder=str(checkpoints[name]), layout=settings)
    differences = [a["difference"] for a in answers if a["difference"] is not None]
    assert differences and max(differences) <= 1e-4
    assert [a["wrong"] for a in answers] == [[]] * ranks and answers[0]["tensors"] > 10
    print(f"\n{name:24}{layout:16}{max(differences):.1e}")
