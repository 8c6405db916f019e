"""Floating-point operations and cached bytes of a model, a token at a time, from its shape. A product counts two operations."""

from __future__ import annotations

from nemo_pivotrl.config import Megatron
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.memory import Layout, layer_parameters

ONE = Layout(tp=1, pp=1, cp=1, dp=1, ep=1, etp=1, expert_dp=1, sp=1)


def active_parameters(a: Architecture) -> int:
    """Weights that one token meets in the layers: all but the embedding, the LM head and the experts it is not sent to."""
    total = 0
    for kind in a.layers:
        count = layer_parameters(a, kind, Megatron(), ONE)
        share = a.moe.top_k / a.moe.num_experts if a.moe and count.experts else 1.0
        total += count.dense + count.wide + count.frozen + int(count.experts * share)
    return total


def forward_flops(a: Architecture, tokens: float, keys: float, predicted: float) -> float:
    """Of one forward pass over `tokens` tokens that see `keys` earlier ones in the mean, with `predicted` rows of logits.

    Matrix products of the layers and the head, attention's two products, and Mamba-2's state and chunk products
    (Dao and Gu 2024, arXiv 2405.21060, section 6).
    """
    attending = sum(kind in "*DE" for kind in a.layers) if not a.hybrid else a.layers.count("*")
    each = 2.0 * active_parameters(a) + 4.0 * attending * a.num_attention_heads * a.head_dim * keys
    if a.mamba is not None:
        inner, states = a.mamba.num_heads * a.mamba.head_dim, a.mamba.num_groups * a.mamba.state_dim
        each += a.layers.count("M") * (4.0 * inner * a.mamba.state_dim + 2.0 * a.mamba.chunk_size * (states + inner))
    return tokens * each + 2.0 * predicted * a.hidden_size * a.vocab_size


def cache_bytes(a: Architecture, tp: int, element: int = 2) -> tuple[int, int]:
    """(a token, a sequence): bytes on one of `tp` ranks of keys and values, and of Mamba states in float32 with their
    convolution's last inputs. With more ranks than key-value heads each rank holds one head."""
    attending = a.layers.count("*") if a.hybrid else len(a.layers)
    heads = max(a.num_key_value_heads // tp, 1)
    state = 0
    if a.mamba is not None:
        inner, states = a.mamba.num_heads * a.mamba.head_dim, a.mamba.num_groups * a.mamba.state_dim
        per_layer = 4 * inner * a.mamba.state_dim + element * (inner + 2 * states) * (a.mamba.conv_kernel - 1)
        state = a.layers.count("M") * per_layer // tp
    return attending * 2 * heads * a.head_dim * element, state


def model_bytes(a: Architecture, tp: int, element: int = 2) -> int:
    """Weights on one of `tp` ranks that share every matrix, experts among them, as an engine for inference holds them."""
    layout = Layout(tp=tp, pp=1, cp=1, dp=1, ep=1, etp=tp, expert_dp=1, sp=1)
    layers = sum(layer_parameters(a, kind, Megatron(), layout).all for kind in a.layers)
    tables = (1 if a.tied else 2) * a.vocab_size * a.hidden_size // tp
    return element * (layers + tables + a.hidden_size)
