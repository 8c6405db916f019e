"""One training step over Megatron, under every layout, against the reference backend on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
import train_jobs
from support.workers import Workers

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
PLAIN = {"use_distributed_optimizer": False}
PACKED = {"sequence_packing": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, PLAIN),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, "sequence_parallel": True}),
    "tp4+sp": (4, {TP: 4, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, PLAIN),
    "dp2 distributed optimizer": (2, {}),
    "cp2": (2, {CP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 x ep2": (4, {TP: 2, EP: 2, "sequence_parallel": True}),
    "packed": (1, PLAIN | PACKED),
    "packed tp2+sp": (2, {TP: 2, "sequence_parallel": True} | PACKED),
    "packed pp2": (2, {PP: 2} | PACKED),
    "packed cp2": (2, {CP: 2} | PACKED),
    "packed ep2": (2, {EP: 2} | PACKED),
    "tp2 x pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
}
CASES = [
    *((kind, "qwen3", layout) for kind in ("grpo", "tfpo") for layout in LAYOUTS if "ep2" not in layout),
    ("grpo", "llama_tied", "pp2"),
    ("grpo", "qwen3_moe", "ep2"),
    ("tfpo", "qwen3_moe", "ep2"),
    ("grpo", "qwen3_moe", "packed ep2"),
    *(("grpo", "nemotron_h", layout) for layout in ("w1", "tp2+sp", "pp2", "ep2", "tp2 x ep2")),
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
    norm = sum(float(g.double().square().sum()) for g in want["gradients"].values()) ** 0.5
    assert answers[0]["taken"]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", {TP: 2, "sequence_parallel": True}),
        ("qwen3", {}),
        ("qwen3", {"bf16": True}),
        ("qwen3", {"bf16": True, **PLAIN}),
        ("qwen3", {PP: 2}),
        ("qwen3_moe", {EP: 2}),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit_and_its_export_is_the_policy(
    workers: Workers, expected: Any, tmp_path: Path, name: str, layout: dict[str, Any]
) -> None:
    folder, _ = expected(name, "grpo")
    answers = workers.run(2, "train_jobs:resume", folder=str(folder), target=str(tmp_path), layout=layout)
    assert [a["equal"] for a in answers] == [True] * 2
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    exported = ReferencePolicy(train_jobs.policy_of(str(tmp_path / "policy"), 10**6))
    found = exported.get_inference_log_probs(train_jobs.grpo_batch())
    tolerance = 0.2 if layout.get("bf16") else 2e-4
    torch.testing.assert_close(found, answers[0]["found"], rtol=0, atol=tolerance)


def test_ranks_without_rows_and_batches_in_parts_change_nothing(workers: Workers, expected: Any) -> None:
    folder, _ = expected("qwen3", "grpo")
    one = workers.run(1, "train_jobs:few_rows", folder=str(folder), layout={}, rows=2, calls=1)[0]
    for ranks, rows_layout, calls in ((4, {}, 1), (2, {}, 2), (4, {PP: 2}, 2)):
        for answer in workers.run(
            ranks, "train_jobs:few_rows", folder=str(folder), layout=rows_layout, rows=2, calls=calls
        ):
            assert answer["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert answer["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_a_gradient_that_is_not_finite_moves_no_weight(workers: Workers, expected: Any) -> None:
    folder, _ = expected("qwen3", "grpo")
    for answer in workers.run(2, "train_jobs:explode", folder=str(folder), layout={}):
        assert "gradient norm" in answer["raised"] and answer["same"]
