"""Training that stops and goes on, in the same layout of ranks to the bit and in others to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from distributed_harness import Workers

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
PLAIN = {"use_distributed_optimizer": False}
SP = {"sequence_parallel": True}
BF16 = {"bf16": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, PLAIN),
    "tp2": (2, {TP: 2, **SP, **PLAIN}),
    "pp2": (2, {PP: 2, **PLAIN}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, PLAIN),
    "dp2 distributed": (2, {}),
    "ep2": (2, {EP: 2, **PLAIN}),
    "ep2 distributed": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, **SP}),
    "tp2 x ep2": (4, {TP: 2, EP: 2, **SP}),
    "pp2 x dp2 distributed": (4, {PP: 2}),
    "bf16 w1": (1, BF16 | PLAIN),
    "bf16 dp2": (2, BF16 | PLAIN),
    "bf16 dp2 distributed": (2, BF16),
    "bf16 tp2": (2, {TP: 2, **SP, **BF16}),
}
MOVES = [
    *(("grpo", "qwen3", a, b) for a, b in (("tp2", "pp2"), ("pp2", "tp2"), ("tp2", "w1"), ("w1", "tp2"))),
    *(("grpo", "qwen3", a, b) for a, b in (("dp2 distributed", "w1"), ("w1", "dp2 distributed"))),
    ("grpo", "qwen3", "dp2 distributed", "tp2 x pp2"),
    ("grpo", "qwen3", "pp2 x dp2 distributed", "cp2"),
    ("grpo", "llama_tied", "pp2", "tp2"),
    ("grpo", "llama_tied", "w1", "pp2"),
    *(("grpo", "qwen3_padded", a, b) for a, b in (("w1", "tp2"), ("tp2", "w1"))),
    *(("grpo", "qwen3_moe", a, b) for a, b in (("ep2", "w1"), ("w1", "ep2"), ("ep2 distributed", "tp2"))),
    *(("grpo", "qwen3_moe", a, b) for a, b in (("tp2", "ep2 distributed"), ("tp2 x ep2", "pp2"))),
    *(("grpo", "nemotron_h", a, b) for a, b in (("tp2", "pp2"), ("pp2", "tp2"), ("ep2", "w1"), ("w1", "tp2 x ep2"))),
    *(("tfpo", "qwen3", a, b) for a, b in (("tp2", "pp2"), ("pp2", "dp2 distributed"), ("dp2 distributed", "w1"))),
    ("tfpo", "qwen3_moe", "ep2 distributed", "w1"),
    ("tfpo", "nemotron_h", "tp2", "pp2"),
    ("grpo", "qwen3", "bf16 dp2 distributed", "bf16 w1"),
    ("grpo", "qwen3", "bf16 w1", "bf16 tp2"),
    ("tfpo", "qwen3", "bf16 dp2 distributed", "bf16 dp2"),
]
STAYS = [
    *(("grpo", "qwen3", layout) for layout in ("w1", "tp2", "pp2", "dp2 distributed", "bf16 dp2", "tp2 x pp2")),
    *((kind, "qwen3", "bf16 dp2 distributed") for kind in ("grpo", "tfpo")),
    *(("tfpo", "qwen3", layout) for layout in ("tp2", "pp2")),
    ("grpo", "qwen3_moe", "ep2 distributed"),
    ("grpo", "nemotron_h", "tp2"),
]

ROUNDED = ("bf16 tp2",)
"""Where another layout adds bfloat16 numbers in another order; data parallelism does not."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a start policy, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def begun(workers: Workers, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, how it went on) of a run, made when first asked for."""
    made: dict[tuple[str, str, str], tuple[Path, list[dict[str, Any]]]] = {}

    def get(kind: str, name: str, layout: str) -> tuple[Path, list[dict[str, Any]]]:
        if (kind, name, layout) not in made:
            target = tmp_path_factory.mktemp("run") / "state"
            ranks, settings = LAYOUTS[layout]
            arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "target": str(target)}
            made[kind, name, layout] = target, workers.run(ranks, "checkpoint_jobs:begin", **arguments)
        return made[kind, name, layout]

    return get


@pytest.mark.parametrize(("kind", "name", "layout"), STAYS)
def test_the_same_layout_goes_on_to_the_bit(
    workers: Workers, model: Any, begun: Any, kind: str, name: str, layout: str
) -> None:
    source, straight = begun(kind, name, layout)
    ranks, settings = LAYOUTS[layout]
    arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "source": str(source)}
    for answer, want in zip(workers.run(ranks, "checkpoint_jobs:resume", **arguments), straight, strict=True):
        assert answer["steps"] == want["steps"] and answer["random"] == want["random"]
        assert torch.equal(answer["log_probs"], want["log_probs"])
        assert (answer["head"] is None) == (want["head"] is None)
        assert answer["head"] is None or torch.equal(answer["head"], want["head"])


@pytest.mark.parametrize(("kind", "name", "source", "target"), MOVES)
def test_another_layout_goes_on_with_the_same_loss(
    workers: Workers, model: Any, begun: Any, kind: str, name: str, source: str, target: str
) -> None:
    state, straight = begun(kind, name, source)
    ranks, settings = LAYOUTS[target]
    arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "source": str(state)}
    answers = workers.run(ranks, "checkpoint_jobs:resume", **arguments)
    off = {key: max(difference(a, straight[0], key) for a in answers) for key in ("loss", "grad_norm", "lr")}
    off["log_probs"] = max(float((a["log_probs"] - straight[0]["log_probs"]).abs().max()) for a in answers)
    print(f"\n{kind:6}{name:13}{source:24}{target:24}" + "  ".join(f"{k} {v:.1e}" for k, v in off.items()))
    assert off["lr"] == 0.0 and max(off.values()) < (0.1 if target in ROUNDED else 2e-5)


def difference(answer: dict[str, Any], want: dict[str, Any], key: str) -> float:
    """The largest relative difference over the steps."""
    pairs = zip(answer["steps"], want["steps"], strict=True)
    return max(abs(a[key] / b[key] - 1) for a, b in pairs)
