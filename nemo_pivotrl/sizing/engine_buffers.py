"""Bytes that Transformer Engine holds beside Megatron's buffers: FP8 copies of weights, and cuBLAS's workspaces.

Figures are those of Transformer Engine 2.15's `get_cublas_workspace_size_bytes` and of its caches of quantised weights.
"""

from __future__ import annotations

from nemo_pivotrl.config import Megatron
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.memory import Layout, stages_of

COPIES = 2
"""An FP8 copy as it is multiplied forward, and one across for the backward pass."""
GROUPED = 4
"""Streams of a grouped product, each with a workspace."""


def workspace_bytes(a: Architecture, m: Megatron, capability: tuple[int, int]) -> int:
    """One workspace for matrix products, and with grouped experts one for each stream."""
    each = 32 * 2**20 + 1024 if capability >= (9, 0) else 4 * 2**20
    return each * (1 + GROUPED * (a.moe is not None and "E" in a.layers and m.moe_grouped_gemm))


def fp8_copy_bytes(a: Architecture, m: Megatron, layout: Layout, stage: int) -> int:
    """FP8 copies of a stage's matrices, which stay from step to step. None where weights themselves are in FP8."""
    if m.fp8 == "none" or m.fp8_param:
        return 0
    first = stage * (len(a.layers) // layout.pp)
    outer = m.first_last_layers_bf16
    begin = m.num_layers_at_start_in_bf16 if outer else 0
    end = len(a.layers) - (m.num_layers_at_end_in_bf16 if outer else 0)
    layers = stages_of(a, layout.pp)[stage]
    return COPIES * sum(_matrices(a, kind, layout) for i, kind in enumerate(layers, first) if begin <= i < end)


def _matrices(a: Architecture, kind: str, layout: Layout) -> int:
    """Elements of a layer's matrices on one rank that are multiplied in FP8: all but embedding, LM head and routers."""
    h = a.hidden_size
    if kind == "M":
        assert a.mamba is not None
        inner, states = a.mamba.num_heads * a.mamba.head_dim, a.mamba.num_groups * a.mamba.state_dim
        return h * (3 * inner + 2 * states + a.mamba.num_heads) // layout.tp
    attention = h * 2 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim // layout.tp
    if kind == "*":
        return attention
    found = 0 if a.hybrid else attention
    matrices = 3 if a.gated else 2
    if kind in "D-":
        return found + matrices * h * a.intermediate_size // layout.tp
    assert a.moe is not None
    moe = a.moe
    width = moe.latent_size or h
    experts = moe.num_experts // layout.ep * matrices * width * moe.intermediate_size // layout.etp
    shared = matrices * h * (moe.shared_intermediate_size or 0) // layout.tp
    return found + experts + shared + 2 * h * (moe.latent_size or 0)
