"""Attention over a forest of shared prefixes (`prefix_tree.py`): a query sees its ancestors and itself. Both backends use it.

Three forms of the same function:

- `dense`: a mask of all pairs. The slow truth.
- `blocks`: the rectangles of the forest, one fused call each, put together by their log-sum-exp as in ring attention. What
  hangs on one place of a trunk is one call against a view of the trunk's keys and values: nothing is gathered or copied
  for each branch, forward or backward, and what is kept for the backward pass is the stream's q, k, v, output and one
  number a query and head. The form for CPUs: torch's fused CPU attention has no public call that gives the log-sum-exp, so
  it calls the operator that `scaled_dot_product_attention` itself calls.
- `flex`: one call of FlexAttention, whose mask is `k <= q < leave[k]`. The form for GPUs, compiled there; eager elsewhere,
  for tests, it makes all scores.

Shapes: q [1, H, S, D], k and v [1, K, S, D] with H a multiple of K; the stream is one batch row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from nemo_pivotrl.algorithms.prefix_tree import Forest, Fork, visible

FLEX_BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""


def attend(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """Attention [1, H, S, D] in the form of the device."""
    return (flex if query.is_cuda else blocks)(query, key, value, forest, scale)


def dense(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """The slow truth."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    mask = visible(forest).to(query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def flex(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """One call of FlexAttention. Raises RuntimeError where it does not run: gradients off a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = _compiled_flex() if query.is_cuda else flex_attention
    return run(query, key, value, block_mask=_block_mask(forest), scale=scale, enable_gqa=query.shape[1] > key.shape[1])


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=4)
def _masks(leave: Tensor) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < leave[key])

    counts_and_places = [x for part in block_lists(leave, FLEX_BLOCK) for x in (part.sum(-1), _listed(part))]
    lists = [x.to(torch.int32)[None, None] for x in counts_and_places]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(len(leave), len(leave)))


def block_lists(leave: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of queries (rows) and keys (columns) of which some pairs are seen, and those of which all are; [n, n] bool, disjoint.

    torch's `create_block_mask` makes the mask of all pairs first, S^2 bytes several times over: 48 GiB at 131,072 tokens. What
    leaves a block of keys first and last is enough, since a query that comes after a key sees it until the key's subtree ends.
    """
    length = len(leave)
    n = -(-length // size)
    padded = torch.nn.functional.pad(leave, (0, n * size - length), value=0).view(n, size)
    first = torch.arange(n, device=leave.device) * size
    below = first[:, None] > first[None]
    some = below & (first[:, None] < padded.amax(1)[None])
    whole = first + size <= length  # the others end with pairs that do not exist
    every = some & whole[:, None] & (first[:, None] + size <= padded.amin(1)[None])
    own = torch.eye(n, dtype=torch.bool, device=leave.device)
    if size == 1:
        return some & ~every, every | own
    return (some & ~every) | own, every


def _listed(part: Tensor) -> Tensor:
    """The columns of each row's True entries in ascending order, then the others."""
    return part.int().argsort(dim=-1, descending=True, stable=True)


def _block_mask(forest: Forest) -> Any:
    """One mask for all layers: tensors hash by identity."""
    return _masks(forest.leave)


def blocks(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """The rectangles of the forest, one fused call each."""
    own = tuple((s.start, s.start + s.length) for s in forest.segments)
    return _Blocks.apply(query, key, value, own, forest.forks, scale)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Blocks(torch.autograd.Function):
    """Own blocks are causal with the heads' keys repeated; a fork's queries of all heads of a group are one long query, so
    that the trunk's keys stay a view."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: tuple[tuple[int, int], ...],
        forks: tuple[Fork, ...],
        scale: float,
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        out = query.new_empty(query.shape, dtype=wide)
        top = query.new_empty(query.shape[:3], dtype=wide)  # log-sum-exp of each query's scores
        for first, last in own:
            part = slice(first, last)
            keys, values = (x[:, :, part].repeat_interleave(repeats, 1) for x in (key, value))
            out[:, :, part], top[:, :, part] = _forward(query[:, :, part], keys, values, 0.0, True, scale=scale)
        for fork in forks:
            part, above = slice(fork.first, fork.last), slice(fork.begin, fork.end)
            folded = _fold(query[:, :, part], repeats)
            found, height = _forward(folded, key[:, :, above], value[:, :, above], 0.0, False, scale=scale)
            found, height = _unfold(found, repeats), height.unflatten(2, (repeats, -1)).flatten(1, 2)
            both = torch.logaddexp(top[:, :, part], height)
            out[:, :, part] *= (top[:, :, part] - both).exp()[..., None]
            out[:, :, part] += found * (height - both).exp()[..., None]
            top[:, :, part] = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, top)
        ctx.own, ctx.forks, ctx.scale = own, forks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With the whole output and log-sum-exp, each block's own backward pass gives its part of the gradient."""
        query, key, value, out, top = ctx.saved_tensors
        repeats = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=top.dtype) for x in (query, key, value))
        for first, last in ctx.own:
            part = slice(first, last)
            keys, values = (x[:, :, part].repeat_interleave(repeats, 1) for x in (key, value))
            of_query, of_keys, of_values = _backward(
                grad[:, :, part],
                query[:, :, part],
                keys,
                values,
                out[:, :, part],
                top[:, :, part],
                0.0,
                True,
                scale=ctx.scale,
            )
            grad_query[:, :, part] += of_query
            grad_key[:, :, part] += of_keys.unflatten(1, (-1, repeats)).sum(2)
            grad_value[:, :, part] += of_values.unflatten(1, (-1, repeats)).sum(2)
        for fork in ctx.forks:
            part, above = slice(fork.first, fork.last), slice(fork.begin, fork.end)
            pulled, asked, got = (_fold(x[:, :, part], repeats) for x in (grad, query, out))
            height = top[:, :, part].unflatten(1, (-1, repeats)).flatten(2, 3)
            of_query, of_keys, of_values = _backward(
                pulled, asked, key[:, :, above], value[:, :, above], got, height, 0.0, False, scale=ctx.scale
            )
            grad_query[:, :, part] += _unfold(of_query, repeats)
            grad_key[:, :, above] += of_keys
            grad_value[:, :, above] += of_values
        kind = query.dtype
        return grad_query.to(kind), grad_key.to(kind), grad_value.to(kind), None, None, None


def _fold(x: Tensor, repeats: int) -> Tensor:
    """[1, K * repeats, n, D] to [1, K, repeats * n, D]."""
    return x.unflatten(1, (-1, repeats)).flatten(2, 3)


def _unfold(x: Tensor, repeats: int) -> Tensor:
    """The way back from `_fold`."""
    return x.unflatten(2, (repeats, -1)).flatten(1, 2)
