"""Attention over a forest of shared prefixes (`prefix_tree.py`): a query sees its ancestors and itself. Both backends use it.

Forms of the same function:

- `dense`: a mask of all pairs. The slow truth.
- `blocks`: rectangles of queries and keys, one fused call each, put together by their log-sum-exp as in ring attention. What
  hangs on one place of a trunk is one call against a view of the trunk's keys and values: nothing is gathered or copied
  for each branch, forward or backward, and what is kept for the backward pass is the stream's q, k, v, output and one
  number a query and head. The form for CPUs: torch's fused CPU attention has no public call that gives the log-sum-exp, so
  it calls the operator that `scaled_dot_product_attention` itself calls.
- `flex`: one call of FlexAttention, whose mask is `k <= q < leave[k]`. A form for GPUs, compiled there; eager elsewhere,
  for tests, it makes all scores.
- `varlen`: the rectangles of `blocks` by a GPU's kernel for packed sequences, one of `varlen_attention.KERNELS`: all segments in one
  causal call, and one call a fork.

Shapes: q [1, H, S, D], k and v [1, K, S, D] with H a multiple of K; the stream is one batch row. A context-parallel rank has
the keys of the whole stream and the queries of some ranges of it, `held`, one behind another: q is then [1, H, S / ranks, D].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from nemo_pivotrl.algorithms.prefix_tree import Forest, Fork, Segment, visible
from nemo_pivotrl.backends import varlen_attention
from nemo_pivotrl.core.errors import InputError, Problem

FLEX_BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""


Ranges = tuple[tuple[int, int], ...]
"""Places first..last-1 of a stream, range by range."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    held: Ranges | None = None,
    form: str = "auto",
) -> Tensor:
    """Attention [1, H, S, D]. held: the queries' places; None: all of the stream. form: as `policy.prefix_attention` names it."""
    if form == "auto":
        form = "flex" if query.is_cuda else "blocks"
    if form in varlen_attention.KERNELS:
        return varlen(query, key, value, forest, scale, held, form)
    return (flex if form == "flex" else blocks)(query, key, value, forest, scale, held)


def check_form(form: str, on_gpu: bool, head_dim: int, dtype: torch.dtype, field: str) -> None:
    """Raise InputError for a form that does not run: not on this device, not with these heads, or without its library."""
    if form == "auto":
        return
    problem = ""
    if not on_gpu:
        found, remedy = f"{form}, on a CPU", "use auto, which is torch's fused attention there"
        raise InputError(Problem("recipe", None, field, found, remedy))
    if form not in varlen_attention.KERNELS:
        return
    if head_dim % 8:
        problem = f"{form}, with heads of {head_dim}"
    elif dtype not in (torch.bfloat16, torch.float16):
        problem = f"{form}, in {str(dtype).removeprefix('torch.')}"
    if problem:
        remedy = "use flex: kernels for packed sequences take 16-bit numbers and heads of a multiple of 8"
        raise InputError(Problem("recipe", None, field, problem, remedy))
    try:
        varlen_attention.kernel(form)
    except (ImportError, AttributeError) as error:
        remedy = f"use flex, or install what has it ({type(error).__name__}: {error})"
        raise InputError(Problem("recipe", None, field, f"{form}, which is not there", remedy)) from error


def dense(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, held: Ranges | None = None
) -> Tensor:
    """The slow truth."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    mask = visible(forest).to(query.device)
    if held is not None:
        mask = mask[_places(held, mask.device)]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def flex(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, held: Ranges | None = None) -> Tensor:
    """One call of FlexAttention. Raises RuntimeError where it does not run: gradients off a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = _compiled_flex() if query.is_cuda else flex_attention
    mask = _masks(forest.leave, held)  # one mask for all layers: tensors hash by identity
    return run(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] > key.shape[1])


def _places(held: Ranges, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in held])


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=4)
def _masks(leave: Tensor, held: Ranges | None = None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    place = torch.arange(len(leave), device=leave.device) if held is None else _places(held, leave.device)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < leave[key])

    def seen_from(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= place[query]) & (place[query] < leave[key])

    counts_and_blocks = [x for part in block_lists(place, leave, FLEX_BLOCK) for x in (part.sum(-1), _listed(part))]
    return BlockMask.from_kv_blocks(
        *(x.to(torch.int32)[None, None] for x in counts_and_blocks),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=seen if held is None else seen_from,
        seq_lengths=(len(place), len(leave)),
    )


def block_lists(place: Tensor, leave: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of queries (rows) and keys (columns) of which some pairs are seen, and those of which all are; [m, n] bool, disjoint.

    place [Q] and leave [S] long: where each query stands, and where each key's subtree ends. torch's `create_block_mask` makes
    the mask of all pairs first, several bytes a pair: 48 GiB at 131,072 tokens. The first and the last query of a block, and the
    first and the last end of a subtree in it, tell the same.
    """

    def ends(numbers: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of each block; what pads the last one is `fill`."""
        padded = functional.pad(numbers, (0, -len(numbers) % size), value=fill).view(-1, size)
        return padded.amin(1), padded.amax(1)

    key = torch.arange(len(leave), device=leave.device)
    first_key, last_key = ends(key, len(leave))  # a key that does not exist stands behind every query
    first, last = ends(place, int(place[-1]))
    soonest, latest = ends(leave, 0)
    some = (last[:, None] >= first_key) & (first[:, None] < latest)
    every = (first[:, None] >= last_key) & (last[:, None] < soonest)
    if len(place) % size:
        every[-1] = False  # it ends with queries that do not exist
    return some & ~every, every


def _listed(part: Tensor) -> Tensor:
    """The columns of each row's True entries in ascending order, then the others."""
    return part.int().argsort(dim=-1, descending=True, stable=True)


class Rectangle(NamedTuple):
    """Queries first..last-1, counted among those that are held, look at keys begin..end-1 of the stream."""

    first: int
    last: int
    begin: int
    end: int


def varlen(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, held: Ranges | None, kernel: str
) -> Tensor:
    """The rectangles by a kernel for packed sequences."""
    made = _calls(forest.segments, forest.forks, held, query.device)
    given = (x[0].transpose(0, 1) for x in (query, key, value))
    found = varlen_attention.attend_by_calls(*given, made, scale, varlen_attention.kernel(kernel))
    return found.transpose(0, 1)[None]


@functools.lru_cache(maxsize=4)
def _calls(
    segments: tuple[Segment, ...], forks: tuple[Fork, ...], held: Ranges | None, device: torch.device
) -> varlen_attention.Calls:
    """One for all layers: making it waits for the device."""
    return varlen_attention.calls(*rectangles(segments, forks, held), device)


def rectangles(
    segments: tuple[Segment, ...], forks: tuple[Fork, ...], held: Ranges | None
) -> tuple[tuple[Rectangle, ...], tuple[Rectangle, ...]]:
    """(squares, in which a query looks at itself and at the keys before it; the others, in which it looks at all).

    Every query is in one square, in their order. Where a range begins inside a segment, what the segment has before it is one of
    the others.
    """
    squares, whole, before = [], [], 0
    for start, stop in held or ((0, segments[-1].start + segments[-1].length),):
        for segment in segments:
            first, last = max(segment.start, start), min(segment.start + segment.length, stop)
            if first < last:
                here = first - start + before
                squares.append(Rectangle(here, here + last - first, first, last))
                if segment.start < first:
                    whole.append(Rectangle(here, here + last - first, segment.start, first))
        for fork in forks:
            first, last = max(fork.first, start), min(fork.last, stop)
            if first < last:
                whole.append(Rectangle(first - start + before, last - start + before, fork.begin, fork.end))
        before += stop - start
    return tuple(squares), tuple(whole)


def blocks(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, held: Ranges | None = None
) -> Tensor:
    """The rectangles of the forest, one fused call each."""
    return _Blocks.apply(query, key, value, *rectangles(forest.segments, forest.forks, held), scale)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Blocks(torch.autograd.Function):
    """Squares are causal with the heads' keys repeated; the others' queries of all heads of a group are one long query, so that
    the keys stay a view."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        squares: tuple[Rectangle, ...],
        whole: tuple[Rectangle, ...],
        scale: float,
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        out = query.new_empty(query.shape, dtype=wide)
        top = query.new_empty(query.shape[:3], dtype=wide)  # log-sum-exp of each query's scores
        for first, last, begin, end in squares:
            part, own = slice(first, last), slice(begin, end)
            keys, values = (x[:, :, own].repeat_interleave(repeats, 1) for x in (key, value))
            out[:, :, part], top[:, :, part] = _forward(query[:, :, part], keys, values, 0.0, True, scale=scale)
        for first, last, begin, end in whole:
            part, above = slice(first, last), slice(begin, end)
            folded = _fold(query[:, :, part], repeats)
            found, height = _forward(folded, key[:, :, above], value[:, :, above], 0.0, False, scale=scale)
            found, height = _unfold(found, repeats), height.unflatten(2, (repeats, -1)).flatten(1, 2)
            both = torch.logaddexp(top[:, :, part], height)
            out[:, :, part] *= (top[:, :, part] - both).exp()[..., None]
            out[:, :, part] += found * (height - both).exp()[..., None]
            top[:, :, part] = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, top)
        ctx.squares, ctx.whole, ctx.scale = squares, whole, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With the whole output and log-sum-exp, each block's own backward pass gives its part of the gradient."""
        query, key, value, out, top = ctx.saved_tensors
        repeats = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=top.dtype) for x in (query, key, value))
        for first, last, begin, end in ctx.squares:
            part, own = slice(first, last), slice(begin, end)
            keys, values = (x[:, :, own].repeat_interleave(repeats, 1) for x in (key, value))
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
            grad_key[:, :, own] += of_keys.unflatten(1, (-1, repeats)).sum(2)
            grad_value[:, :, own] += of_values.unflatten(1, (-1, repeats)).sum(2)
        for first, last, begin, end in ctx.whole:
            part, above = slice(first, last), slice(begin, end)
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
