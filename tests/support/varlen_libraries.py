"""Libraries with attention for packed sequences, for CPUs: functions with the libraries' own signatures over plain torch.

`tests/trace/test_varlen.py` holds the signatures against the libraries' sources. PyTorch's operators are PyTorch's own, with an
implementation for CPUs: its dispatcher checks what they are given.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends import varlen_attention

CALLED: Counter[str] = Counter()


def sequences(bounds_q: Tensor, bounds_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Places of queries and keys of each sequence."""
    queries, keys = bounds_q.tolist(), bounds_k.tolist()
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(queries) == len(keys)
    for i in range(len(queries) - 1):
        yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])


def scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """[H, q, k]; causal: the last query sees all keys."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        seen = torch.ones(found.shape[1:], dtype=torch.bool).tril(found.shape[2] - found.shape[1])
        found = found.masked_fill(~seen, -math.inf)
    return found


def run(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor, int, int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [Q, H, D], log-sum-exp [H, Q])."""
    bounds_q, bounds_k, longest_q, longest_k = bounds
    assert len(query) == bounds_q[-1] and len(key) == len(value) == bounds_k[-1]
    assert longest_q == bounds_q.diff().max() and longest_k == bounds_k.diff().max()
    out, top = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    repeats = query.shape[1] // key.shape[1]
    for q, k in sequences(bounds_q, bounds_k):
        found = scores(query[q], key[k], causal, scale)
        top[:, q] = found.logsumexp(2)
        out[q] = torch.einsum("hqk,khd->qhd", found.softmax(2), value[k].repeat_interleave(repeats, 1))
    return out, top


def back(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels do it: probabilities from the log-sum-exp given, and their gradient from the output given."""
    assert top.is_contiguous() and grad.is_contiguous() and top.shape == (query.shape[1], len(query))
    repeats = query.shape[1] // key.shape[1]
    of_query, of_key, of_value = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    delta = (grad * out).sum(-1).T
    for q, k in sequences(*bounds[:2]):
        likely = (scores(query[q], key[k], causal, scale) - top[:, q, None]).exp()
        values = value[k].repeat_interleave(repeats, 1)
        pulled = likely * (torch.einsum("qhd,khd->hqk", grad[q], values) - delta[:, q, None]) * scale
        of_query[q] = torch.einsum("hqk,khd->qhd", pulled, key[k].repeat_interleave(repeats, 1))
        of_key[k] = torch.einsum("hqk,qhd->khd", pulled, query[q]).unflatten(1, (-1, repeats)).sum(2)
        of_value[k] = torch.einsum("hqk,qhd->khd", likely, grad[q]).unflatten(1, (-1, repeats)).sum(2)
    return of_query, of_key, of_value


# ---- PyTorch: implementations of its own operators ----


def aten_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    **_: Any,
) -> tuple[Tensor, ...]:
    CALLED["torch"] += 1
    assert not dropout_p and not return_debug_mask
    out, top = run(query, key, value, (cum_seq_q, cum_seq_k, max_q, max_k), is_causal, scale)
    none = torch.empty(0)
    return out, top, torch.zeros(2, dtype=torch.uint64), none, none


def aten_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert rng_state.shape == (2,) and not dropout_p
    return back(grad_out, query, key, value, out, logsumexp, (cum_seq_q, cum_seq_k, max_q, max_k), is_causal, scale)


# ---- FlashAttention 2 ----


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, ...]:
    CALLED["flash_attn_2"] += 1
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
    assert alibi_slopes is block_table is leftpad_k is seqused_k is None and not return_softmax
    out, top = run(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), causal, softmax_scale)
    return out, top, torch.empty(0), torch.zeros(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    found = back(dout, q, k, v, out, softmax_lse, bounds, causal, softmax_scale)
    for made, value in zip((dq, dk, dv), found, strict=True):
        assert made is not None and made.is_contiguous()
        made.copy_(value)
    return torch.empty(0)


# ---- FlashAttention 3 ----


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: None,
    v_new: None,
    qv: None,
    out: None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_k_new: None,
    seqused_q: None,
    seqused_k: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    page_table: None,
    kv_batch_idx: None,
    leftpad_k: None,
    rotary_cos: None,
    rotary_sin: None,
    seqlens_rotary: None,
    q_descale: None,
    k_descale: None,
    v_descale: None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    """What the real one has behind these is never given."""
    CALLED["flash_attn_3"] += 1
    nothing = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
    nothing += (rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale)
    assert not any(x is not None for x in nothing)
    found = run(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), causal, softmax_scale)
    return *found, torch.empty(0), torch.empty(0)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sequed_q: None,
    sequed_k: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    assert sequed_q is sequed_k is None
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    found = back(dout, q, k, v, out, softmax_lse, bounds, causal, softmax_scale)
    for made, value in zip((dq, dk, dv), found, strict=True):
        assert made.is_contiguous()
        made.copy_(value)
    return torch.empty(0)


# ---- Transformer Engine ----

FORMATS = {"qkv_layout": "thd_thd_thd", "o_format": "thd"}
BACK_FORMATS = {**FORMATS, "do_format": "thd", "dqkv_layout": "thd_thd_thd"}
MASKS = {"padding": ((-1, -1), False), "padding_causal": ((-1, 0), True)}
"""(window, causal)."""


def fused_attn_fwd(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    fused_attention_backend: Any,
    *,
    cu_seqlens_q_padded: Tensor,
    cu_seqlens_kv_padded: Tensor,
    attn_scale: float,
    qkv_layout: str,
    o_format: str,
    attn_mask_type: str,
    window_size: tuple[int, int],
) -> tuple[Tensor, list[Tensor]]:
    CALLED["transformer_engine"] += 1
    assert is_training and fused_attention_backend == "arbitrary" and fake_dtype == q.dtype
    assert {"qkv_layout": qkv_layout, "o_format": o_format} == FORMATS and MASKS[attn_mask_type][0] == window_size
    assert cu_seqlens_q_padded is cu_seqlens_q and cu_seqlens_kv_padded is cu_seqlens_kv
    bounds = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
    out, top = run(q, k, v, bounds, MASKS[attn_mask_type][1], attn_scale)
    return out, [top.T.contiguous()[:, :, None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux_ctx_tensors: list[Tensor],
    fused_attention_backend: Any,
    *,
    cu_seqlens_q_padded: Tensor,
    cu_seqlens_kv_padded: Tensor,
    attn_scale: float,
    qkv_layout: str,
    o_format: str,
    do_format: str,
    dqkv_layout: str,
    attn_mask_type: str,
    window_size: tuple[int, int],
) -> tuple[Tensor | None, ...]:
    given = {"qkv_layout": qkv_layout, "o_format": o_format, "do_format": do_format, "dqkv_layout": dqkv_layout}
    assert given == BACK_FORMATS and MASKS[attn_mask_type][0] == window_size
    top, state = aux_ctx_tensors
    assert top.is_contiguous() and top.shape == (len(q), q.shape[1], 1) and state.shape == (2,)
    bounds = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
    causal = MASKS[attn_mask_type][1]
    return *back(d_o, q, k, v, o, top[:, :, 0].T.contiguous(), bounds, causal, attn_scale), None


def modules() -> dict[str, ModuleType]:
    """The libraries' modules, by name."""
    made: dict[str, Any] = {}
    for name in (
        "flash_attn.flash_attn_interface",
        "flash_attn_interface",
        "transformer_engine.pytorch.cpp_extensions.fused_attn",
    ):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        for i in range(1, len(parts)):
            setattr(made[".".join(parts[:i])], parts[i], made[".".join(parts[: i + 1])])
    made["flash_attn.flash_attn_interface"]._wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
    made["flash_attn.flash_attn_interface"]._wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
    made["flash_attn_interface"]._flash_attn_forward = _flash_attn_forward
    made["flash_attn_interface"]._flash_attn_backward = _flash_attn_backward
    engine = made["transformer_engine.pytorch.cpp_extensions.fused_attn"]
    engine.fused_attn_fwd, engine.fused_attn_bwd = fused_attn_fwd, fused_attn_bwd
    engine.FusedAttnBackend = {"F16_arbitrary_seqlen": "arbitrary"}
    return made


@contextmanager
def installed() -> Iterator[None]:
    """All libraries are there for as long as it lasts."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", aten_forward, "CPU")
    library.impl("_flash_attention_backward", aten_backward, "CPU")
    made = modules()
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    varlen_attention.kernel.cache_clear()
    try:
        yield
    finally:
        library._destroy()
        varlen_attention.kernel.cache_clear()
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
