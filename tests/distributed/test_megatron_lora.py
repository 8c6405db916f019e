"""LoRA over Megatron, layout by layout, against peft on one device: gradients, a step, exports, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_jobs
import pytest
import tiny_hf
import torch
from safetensors.torch import load_file
from support.workers import Workers

from nemo_pivotrl.backends.megatron.lora_mapping import lora_problems
from nemo_pivotrl.config import Lora
from nemo_pivotrl.sizing.architecture import read_architecture

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, {}),
    "w1 full recompute": (1, {"recompute": "full"}),
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, **SP}),
    "tp4+sp": (4, {TP: 4, **SP}),  # more ranks than key-value heads
    "pp2": (2, {PP: 2}),
    "cp2": (2, {CP: 2}),
    "ep2": (2, {EP: 2}),
    "tp2 x pp2 recompute": (4, {TP: 2, PP: 2, **SP, "recompute": "full"}),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MAMBA = [*DENSE, "in_proj"]
CASES = [
    *(("grpo", "qwen3", DENSE, layout, False) for layout in LAYOUTS if layout != "ep2"),
    ("grpo", "qwen3", ["q_proj", "v_proj", "up_proj"], "tp2+sp", False),
    ("grpo", "qwen3", DENSE, "tp2+sp", True),
    ("tfpo", "qwen3", DENSE, "tp2+sp", False),
    ("tfpo", "qwen3", DENSE, "pp2", False),
    ("grpo", "llama_tied", DENSE, "pp2", False),
    ("grpo", "qwen3_moe", ATTENTION, "ep2", False),
    *(("grpo", "nemotron_h", MAMBA, layout, False) for layout in ("w1", "tp2+sp", "pp2", "ep2")),
    ("grpo", "nemotron_h", MAMBA, "cp2", True),
]


@pytest.fixture(scope="module")
def expected(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, peft's answer) of a model, an algorithm and the layers it adapts, made when first asked for."""
    folders: dict[str, Path] = {}
    answers: dict[Any, dict[str, Any]] = {}

    def get(name: str, kind: str, modules: list[str]) -> tuple[Path, dict[str, Any]]:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, folders[name])
        key = name, kind, tuple(modules)
        if key not in answers:
            (start,) = workers.run(1, "lora_jobs:start_of", folder=str(folders[name]), modules=modules)
            answers[key] = lora_jobs.reference(str(folders[name]), kind, modules, start)
        return folders[name], answers[key]

    return get


def apart(found: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each gradient, as a part of the largest number in any."""
    scale = max(float(g.abs().max()) for g in want["gradients"].values())
    return {key: float((found[key] - g).abs().max()) / scale for key, g in want["gradients"].items()}


@pytest.mark.parametrize("harm", ["unsummed", "scale", "order"])
def test_mistakes_one_could_make_are_found(workers: Workers, expected: Any, tmp_path: Path, harm: str) -> None:
    folder, want = expected("qwen3", "grpo", DENSE)
    given = {"kind": "grpo", "modules": DENSE, "share": False, "target": str(tmp_path / "policy"), "harm": harm}
    ranks, layout = LAYOUTS["w1" if harm == "order" else "tp2+sp"]  # on two ranks each has one key-value head, in order
    answers = workers.run(ranks, "lora_jobs:train_harmed", folder=str(folder), layout=layout, **given)
    assert max(apart(answers[0]["gradients"], want).values()) > 1e-2


@pytest.mark.parametrize(("kind", "name", "modules", "layout", "share"), CASES)
def test_a_step_is_that_of_peft(
    workers: Workers,
    expected: Any,
    tmp_path: Path,
    kind: str,
    name: str,
    modules: list[str],
    layout: str,
    share: bool,
) -> None:
    folder, want = expected(name, kind, modules)
    ranks, settings = LAYOUTS[layout]
    given = {"kind": kind, "modules": modules, "layout": settings, "share": share, "target": str(tmp_path / "policy")}
    answers = workers.run(ranks, "lora_jobs:train", folder=str(folder), **given)
    for answer in answers:
        for key in ("log_probs", "start", "after"):
            torch.testing.assert_close(answer[key], want[key], rtol=0, atol=3e-4)
        assert not answer["moved"]
        assert answer["taken"]["grad_norm"] == pytest.approx(want["taken"]["grad_norm"], rel=2e-4)
        for key, value in want["metrics"].items():
            if key not in ("token_ratio", "ordered_drift"):
                assert answer["metrics"][key] == pytest.approx(value, rel=3e-4, abs=3e-5), key
    assert (want["start"] - want["log_probs"]).abs().max() > 1e-2  # the adapters say something
    found = answers[0]["gradients"]
    assert found.keys() == want["gradients"].keys()
    errors = apart(found, want)
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{kind:6}{name:12}{layout:22}{len(found):4} matrices {errors[worst]:.1e}  {worst}")
    assert errors[worst] < 1e-4, worst
    assert min(float(g.abs().max()) for g in want["gradients"].values()) > 0
    merged = answers[0]["weights"]
    for key, tensor in want["weights"].items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=1e-5)
    sent = load_file(tmp_path / "policy-trained/model.safetensors")
    assert all(torch.equal(tensor, merged[key]) for key, tensor in sent.items())
    named = {key.removesuffix(".weight").rpartition(".")[2] for key in sent}
    assert set(modules) & {"q_proj", "in_proj", "o_proj"} <= named
    assert not any("experts." in key and "shared" not in key for key in sent)
    written = load_file(tmp_path / "policy/adapter/adapter_model.safetensors")
    assert {lora_jobs.layer(key) for key in written} == found.keys()


@pytest.mark.parametrize(("name", "modules"), [("qwen3", DENSE), ("qwen3_moe", ATTENTION), ("nemotron_h", MAMBA)])
def test_peft_reads_the_adapters_and_transformers_the_merged_policy(
    workers: Workers, expected: Any, tmp_path: Path, name: str, modules: list[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = expected(name, "grpo", modules)
    given = {"kind": "grpo", "modules": modules, "share": False, "target": str(tmp_path / "policy")}
    workers.run(2, "lora_jobs:train", folder=str(folder), layout={TP: 2, **SP}, **given)
    tokens = torch.load(folder / "tokens.pt", weights_only=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        plain = base(tokens, use_cache=False).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "policy/adapter").eval()
        torch.testing.assert_close(
            adapted(tokens, use_cache=False).logits, merged(tokens, use_cache=False).logits, rtol=0, atol=2e-4
        )
        assert (adapted(tokens, use_cache=False).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "wrote", "reads"),
    [
        ("qwen3", (1, {}), (1, {})),
        ("qwen3", (2, {TP: 2, **SP}), (2, {PP: 2})),
        ("qwen3", (2, {"bf16": True}), (2, {"bf16": True})),
        ("qwen3", (4, {TP: 4, **SP}), (1, {"use_distributed_optimizer": False})),
        ("nemotron_h", (2, {EP: 2}), (2, {TP: 2, **SP})),
    ],
)
def test_a_checkpoint_is_read_by_every_layout(
    workers: Workers, expected: Any, tmp_path: Path, name: str, wrote: Any, reads: Any
) -> None:
    folder, _ = expected(name, "grpo", DENSE)
    given = {"folder": str(folder), "state": str(tmp_path / "state")}
    straight = workers.run(wrote[0], "lora_jobs:steps", layout=wrote[1], load=False, count=3, **given)[0]
    workers.run(wrote[0], "lora_jobs:steps", layout=wrote[1], load=False, count=2, **given)
    found = workers.run(reads[0], "lora_jobs:steps", layout=reads[1], load=True, count=1, **given)[0]
    for key, tensor in straight.items():
        if wrote == reads:
            assert torch.equal(found[key], tensor), key
        else:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-5)


def test_a_checkpoint_of_other_adapters_is_refused(workers: Workers, expected: Any, tmp_path: Path) -> None:
    folder, _ = expected("qwen3", "grpo", DENSE)
    given = {"folder": str(folder), "state": str(tmp_path / "state")}
    workers.run(1, "lora_jobs:steps", layout={}, load=False, count=1, **given)
    (said,) = workers.run(1, "lora_jobs:other_adapters", modules=["q_proj"], **given)
    assert "policy.lora" in said and "begin a new run" in said


def test_what_cannot_be_adapted_is_refused(expected: Any) -> None:
    def remedies(name: str, tp: int, *modules: str) -> list[str]:
        shape = read_architecture(expected(name, "grpo", ATTENTION)[0])
        found = lora_problems(shape, Lora(enabled=True, target_modules=modules), tp)
        return [problem.remedy for problem in found]

    (experts,) = remedies("qwen3_moe", 2, "w1")
    assert "outside the routed experts" in experts
    (mamba,) = remedies("nemotron_h", 2, "q_proj", "out_proj")
    assert "peft refuses it" in mamba
    assert not remedies("qwen3", 4, "q_proj", "k_proj")  # two key-value heads on four ranks: some have queries alone
    (bare,) = remedies("qwen3", 4, "k_proj")
    assert "without a row" in bare
