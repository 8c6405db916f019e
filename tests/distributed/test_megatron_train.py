"""One training step over Megatron, under every layout, against the reference backend on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
import train_jobs
from distributed_harness import Workers

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
PLAIN = {"use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, PLAIN),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, PLAIN),
    "dp2 distributed optimizer": (2, {}),
    "cp2": (2, {CP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
}
CASES = [
    *((kind, "qwen3", layout) for kind in ("grpo", "tfpo") for layout in LAYOUTS if layout != "ep2"),
    ("grpo", "llama_tied", "pp2"),
    ("grpo", "qwen3_moe", "ep2"),
    ("tfpo", "qwen3_moe", "ep2"),
]


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, the reference backend's answer) of a model and an algorithm, made when first asked for."""
    folders: dict[str, Path] = {}
    answers: dict[tuple[str, str], dict[str, Any]] = {}

    def get(name: str, kind: str) -> tuple[Path, dict[str, Any]]:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, folders[name])
        if (name, kind) not in answers:
            answers[name, kind] = train_jobs.reference(str(folders[name]), kind)
        return folders[name], answers[name, kind]

    return get


@pytest.mark.parametrize(("kind", "name", "layout"), CASES)
def test_a_step_is_that_of_the_reference_backend(
    workers: Workers, expected: Any, kind: str, name: str, layout: str
) -> None:
    folder, want = expected(name, kind)
    ranks, settings = LAYOUTS[layout]
    answers = workers.run(ranks, "train_jobs:train", folder=str(folder), kind=kind, layout=settings)
    rows = len(want["log_probs"])
    for answer in answers:
        torch.testing.assert_close(answer["log_probs"], want["log_probs"], rtol=0, atol=2e-4)
        assert answer["metrics"] == answers[0]["metrics"] and answer["taken"] == answers[0]["taken"]
        for key, value in want["metrics"].items():
            if key == "ordered_drift":  # at the start a drift is rounding noise, whose sign is nobody's
                continue
            assert answer["metrics"][key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
        assert torch.equal(answer["start"], answer["log_probs"]) and not torch.equal(answer["after"], answer["start"])
        if kind == "grpo" and answer["last_stage"]:
            assert answer["ratio"] == 0.0  # the ratio of the first update is exactly 1
    seen = sorted(a for answer in answers if answer["first_of_replicas"] for a in answer["seen"])
    if kind == "grpo":
        assert seen == sorted(round(float(a), 6) for a in train_jobs.grpo_batch(rows).data["advantages"])
    found = answers[0]["gradients"] | next(a["head"] for a in answers if a["last_stage"])
    scale = max(float(g.abs().max()) for g in want["gradients"].values())
    errors = {key: float((found[key] - g).abs().max()) / scale for key, g in want["gradients"].items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{kind:6}{name:12}{layout:28}{errors[worst]:.1e}  {worst}")
    assert errors[worst] < 1e-4, worst
