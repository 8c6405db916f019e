"""A slice of every GPU recipe's training step: it runs, nothing is refused, and `plan` is within a tenth of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from traced import GPU_RECIPES, LLMDOCTOR, PIVOTRL, ranks_of, run

CASES = [(recipe, rank) for recipe in GPU_RECIPES for rank in ranks_of(recipe)]


@pytest.mark.parametrize(("recipe", "rank"), CASES, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_a_recipes_step_runs_and_its_memory_is_what_plan_says(recipe: Path, rank: int) -> None:
    found = run(recipe, rank=rank)
    assert found.answer, found.error[-3000:]
    assert (found.off(), found.answer["traced"]["broken_fp8"], found.answer["traced"]["unmapped"]) == ([], [], [])
    assert found.code == 0 and found.answer["good"]


@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise", "delayed"])
def test_every_fp8_scaling_runs_in_every_layer(scaling: str) -> None:
    for recipe in ("qwen3-8b-1n8g-tp2-conversational", "qwen3-30b-a3b-thinking-4n8g-tp4ep8-search"):
        settings = ["megatron.fp8=hybrid", f"megatron.fp8_recipe={scaling}", "megatron.first_last_layers_bf16=false"]
        found = run(PIVOTRL / f"pivotrl-{recipe}.yaml", *settings)
        assert found.answer, found.error[-3000:]
        assert found.answer["traced"]["broken_fp8"] == [] and found.answer["traced"]["copies"] > 0
        assert "at most, all together" not in found.off()


def test_rows_without_shared_prefixes_use_fused_attention_over_context_parallel_ranks() -> None:
    recipe = PIVOTRL / "pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml"
    found = run(recipe, "policy.prefix_sharing=false")
    traced = found.answer["traced"]
    assert found.code == 0 and any(name.startswith("FusedAttention") for name in traced["attention"])
    assert {"fused_attn_fwd", "fused_attn_bwd", "te_general_grouped_gemm"} <= traced["kernels"].keys()
    assert any(name.startswith("send, cp of 16") for name in traced["collectives"])


def test_shared_prefixes_fork_mambas_states_and_gather_keys_over_context_parallel_ranks() -> None:
    recipe = PIVOTRL / "pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml"
    found = run(recipe, "policy.prefix_sharing=true", layers="M*M*")
    kernels = found.answer["traced"]["kernels"]
    assert (
        kernels["flex_attention"] == 4 and kernels["flex_attention_backward"] == 2
    )  # computed again in the backward pass
    assert found.answer["traced"]["attention"] == {"FlexAttention over shared prefixes": 4}
    assert kernels["_state_passing_fwd_kernel"] > kernels["_chunk_scan_bwd_dstates_kernel"] >= 4
    assert any(name.startswith("_allgather_base, cp of 16") for name in found.answer["traced"]["collectives"])


def test_a_doctors_head_and_loss_reach_the_last_stage() -> None:
    found = run(LLMDOCTOR / "llmdoctor-tulu-2-70b-1n8g-tp8-ultrafeedback.yaml", layers="DD")
    assert found.code == 0 and found.answer["traced"]["modules"]["torch.Linear"] == 1
