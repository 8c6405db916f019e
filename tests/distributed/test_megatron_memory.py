"""The arithmetic of memory against training steps that count every living byte, on every kind of layer and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_hf
from support.workers import Workers

from nemo_pivotrl.config import Megatron
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture
from nemo_pivotrl.sizing.memory import MicroBatch, activation_bytes, layout_of, stage_parameters, state_bytes

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP, SP = "context_parallel_size", {"sequence_parallel": True}
# no two sizes alike, so that no term can stand in for another
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 112,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 368,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
GPT = SHAPE | {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 88, "norm_topk_prob": True}
HYBRID = SHAPE | {
    "ssm_state_size": 24,
    "mamba_num_heads": 12,
    "mamba_head_dim": 20,
    "n_groups": 4,
    "chunk_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 88,
    "moe_shared_expert_intermediate_size": 184,
    "moe_latent_size": 64,
    "routed_scaling_factor": 2.5,
    "hybrid_override_pattern": "MEM*EM-E",
}
MODELS = {
    "llama": ("LlamaConfig", GPT | {"hidden_size": 160, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", GPT | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", GPT | EXPERTS),
    "nemotron_h": ("NemotronHConfig", HYBRID),
}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((name, 1, {"recompute": r}) for name in MODELS for r in ("none", "selective", "full")),
    ("qwen3", 1, {"bf16": False}),
    ("nemotron_h", 1, {"bf16": False, "recompute": "full"}),
    ("qwen3", 1, {"use_distributed_optimizer": False}),
    ("qwen3", 2, {"grad_reduce_in_fp32": False}),
    ("qwen3_moe", 1, {"moe_freeze_router": False}),
    ("llama", 2, {TP: 2}),
    ("llama", 2, {TP: 2, **SP}),
    ("qwen3", 2, {CP: 2}),
    ("qwen3", 2, {PP: 2}),
    ("qwen3", 2, {}),
    ("qwen3_moe", 2, {EP: 2}),
    ("nemotron_h", 2, {TP: 2, **SP}),
    ("nemotron_h", 2, {PP: 2}),
    ("nemotron_h", 2, {EP: 2, "recompute": "full"}),
    ("qwen3_moe", 4, {TP: 2, EP: 2, **SP}),
    ("nemotron_h", 4, {TP: 2, EP: 2, **SP, "recompute": "full"}),
]
PROMPT, RESPONSE = 256, 128


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Architecture]]:
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_hf, "MODELS", MODELS)
        for name in MODELS:
            folder = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, folder)
            made[name] = folder, read_architecture(folder)
    return made


@pytest.mark.parametrize(("name", "ranks", "settings"), CASES, ids=lambda v: str(v).replace("_model_parallel_size", ""))
def test_a_ranks_memory_is_what_the_arithmetic_says(
    workers: Workers, folders: dict[str, tuple[Path, Architecture]], name: str, ranks: int, settings: dict[str, Any]
) -> None:
    folder, a = folders[name]
    m = Megatron(cpu=True, **settings)
    layout = layout_of(m, ranks)
    batches = 4 if layout.pp > 1 else 1
    answers = workers.run(
        ranks,
        "memory_jobs:step",
        folder=str(folder),
        settings=settings,
        prompt=PROMPT,
        response=RESPONSE,
        rows=batches * layout.dp,
    )
    assert len(answers) == ranks
    for rank, found in enumerate(answers):
        stage = rank // (ranks // layout.pp)
        count = stage_parameters(a, m, layout, stage)
        state = state_bytes(count, m, layout)
        batch = MicroBatch(PROMPT + RESPONSE, PROMPT + RESPONSE, RESPONSE)
        activations = activation_bytes(a, m, layout, stage, batch, "local", batches)
        assert (count.all, state.weights) == (found["parameters"], found["weights"])
        # a parameter begins at a multiple of 64 elements, and the buffer ends where all ranks' parts are equal
        assert 0 <= found["gradients"] - state.gradients <= 4 * (64 * found["tensors"] + 512)
        assert state.optimizer == pytest.approx(found["optimizer"], rel=2e-3)  # cut in the middle of a buffer
        if stage == layout.pp - 1:
            assert activations.held == pytest.approx(found["held"], rel=0.06, abs=150_000)
        total = state.weights + state.gradients + state.optimizer + activations.peak
        measured = found["weights"] + found["gradients"] + found["optimizer"] + found["peak"]
        assert total == pytest.approx(measured, rel=0.1)
        print(f"\n{name:12}{settings} rank {rank}: held {activations.held / max(found['held'], 1):.3f}, ", end="")
        print(f"all {total / measured:.3f} of {measured / 1e6:.1f} MB")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_took_a_step_is_freed_when_nobody_uses_it(
    workers: Workers, folders: dict[str, tuple[Path, Architecture]], name: str
) -> None:
    step = {"folder": str(folders[name][0]), "settings": {}, "prompt": 16, "response": 8, "rows": 1}
    assert workers.run(1, "memory_jobs:kept", **step) == [0]
