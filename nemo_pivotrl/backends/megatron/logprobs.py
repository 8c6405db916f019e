"""Log-probabilities of chosen tokens from hidden states and an LM head whose vocabulary is cut over a tensor-parallel group.

Shapes: `M` tokens (any leading shape is kept), `V` columns of this rank's shard, `H` hidden size. Everything is computed
in float32 (or float64, where that comes in) and in nats. `group` None means that the vocabulary is whole on this rank: it
never means "the world".

Logits are made a chunk of tokens at a time, and once more in the backward pass, so that fp32 logits of a whole sequence
never exist. A call costs two small all-reduces forward, however many chunks, and one backward: the hidden states' gradient
is a sum over the vocabulary, hence over ranks.

A target below 0 is ignored: log-probability 0, no gradient. One at or above `vocab_size` gives NaN, which the gradient
check finds, instead of a number that looks like any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_pivotrl.algorithms.model_outputs import wide


class Shard(NamedTuple):
    """Which columns of the padded vocabulary this rank holds, and of which group it is a part."""

    group: dist.ProcessGroup | None
    first: int
    """Global number of this rank's first column."""
    real: int
    """Of this rank's columns, how many are tokens; the rest is padding and has probability 0."""
    temperature: float


class _Found(NamedTuple):
    """Statistics of one piece of the vocabulary, [M] each; `_merge` makes one of many."""

    top: Tensor
    """Largest logit."""
    total: Tensor
    """Sum of exp(logit - top)."""
    chosen: Tensor
    """Logit of the target, 0 where another rank has it."""
    owners: Tensor
    """1 where this rank has the target."""


def shard_of(
    columns: int, group: dist.ProcessGroup | None, vocab_size: int | None = None, temperature: float = 1.0
) -> Shard:
    """This rank's shard of a vocabulary cut evenly over `group`, each rank holding `columns` columns.

    vocab_size: real tokens; the last shards' columns beyond are padding. None: all columns are tokens. Raises ValueError
    for a temperature that is not positive and a vocabulary larger than all shards together.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    size = columns * ranks if vocab_size is None else vocab_size
    if not 0 < size <= columns * ranks:
        raise ValueError(f"{ranks} shards of {columns} columns cannot hold a vocabulary of {size} tokens")
    first = rank * columns
    return Shard(group, first, min(max(size - first, 0), columns), temperature)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    chunk: int,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability [...] of `targets` [...] under softmax(hidden @ weight.T / temperature), `chunk` tokens at a time.

    hidden [..., H] and targets, global token ids, are the same on every rank of the group, as is the result. weight [V, H]:
    this rank's shard. The matrix products run in hidden's dtype, everything after them in float32; the weight's gradient is
    summed over chunks in float32. Raises ValueError as `shard_of` does, for an empty chunk and for other than one target
    a token.
    """
    if chunk < 1:
        raise ValueError(f"a chunk holds at least one token, got {chunk}")
    shard = shard_of(weight.shape[0], group, vocab_size, temperature)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] != targets.numel():
        raise ValueError(f"hidden states of {flat.shape[0]} tokens for {targets.numel()} targets")
    log_probs: Tensor = _FromHidden.apply(flat, weight, targets.reshape(-1), shard, chunk)
    return log_probs.view(targets.shape)


def _scaled(logits: Tensor, shard: Shard) -> Tensor:
    """Logits [M, V] over temperature, padding columns at -inf; may be the same tensor."""
    x = wide(logits)
    if shard.temperature != 1.0:
        x = x / shard.temperature
    if shard.real < x.shape[1]:
        x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= shard.real, -torch.inf)
    return x


def _look(logits: Tensor, targets: Tensor, shard: Shard) -> _Found:
    """Statistics of this rank's columns. Overwrites `logits`: at these sizes every copy counts."""
    x = _scaled(logits, shard)
    lowest = torch.finfo(x.dtype).min  # a shard of padding alone has no largest logit
    top = x.amax(1).clamp(min=lowest) if x.numel() else x.new_full((x.shape[0],), lowest)
    place, mine = _place(targets, shard)
    chosen = x.gather(1, place[:, None])[:, 0].masked_fill(~mine, 0.0)
    return _Found(top, x.sub_(top[:, None]).exp_().sum(1), chosen, mine.to(x.dtype))


def _place(targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Local column [M] of each target, and whether it is this rank's."""
    local = targets - shard.first
    mine = (local >= 0) & (local < shard.real)
    return local.masked_fill(~mine, 0), mine


def _merge(found: _Found, targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(log-probability, log of the normaliser) [M] over all ranks: one MAX and one SUM of a few numbers."""
    top = found.top
    if shard.group is not None:
        top = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, shard.group)
    fade = (found.top - top).masked_fill(found.total == 0, 0.0).exp()
    sums = torch.stack([found.total * fade, found.chosen, found.owners])
    if shard.group is not None:
        dist.all_reduce(sums, dist.ReduceOp.SUM, shard.group)
    total, chosen, owners = sums.unbind(0)
    normaliser = top + total.log()
    log_probs = torch.where(owners > 0, chosen - normaliser, torch.full_like(chosen, torch.nan))
    return log_probs.masked_fill(targets < 0, 0.0), normaliser


def _grad_logits(logits: Tensor, targets: Tensor, shard: Shard, normaliser: Tensor, grad_log_probs: Tensor) -> Tensor:
    """Gradient [M, V] with respect to this rank's logits, which it overwrites; needs nothing from other ranks.

    d log p(y) / dx_j = [j = y] - p_j, over the temperature.
    """
    pull = grad_log_probs.masked_fill(targets < 0, 0.0)
    grad = _scaled(logits, shard).sub_(normaliser[:, None]).exp_().mul_(-pull[:, None])
    place, mine = _place(targets, shard)
    grad.scatter_add_(1, place[:, None], pull.masked_fill(~mine, 0.0)[:, None])
    return grad.div_(shard.temperature) if shard.temperature != 1.0 else grad


class _FromHidden(torch.autograd.Function):
    """Keeps hidden states, weight and one number a token; logits live for one chunk at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: Shard, chunk: int) -> Tensor:
        pieces = [
            _look(part @ weight.t(), goal, shard)
            for part, goal in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        found = _Found(*(torch.cat(fields) for fields in zip(*pieces, strict=True)))
        log_probs, normaliser = _merge(found, targets, shard)
        ctx.shard, ctx.chunk = shard, chunk
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        shard: Shard = ctx.shard
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide(weight).dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            at = slice(start, start + ctx.chunk)
            logits = hidden[at] @ weight.t()
            grad = _grad_logits(logits, targets[at], shard, normaliser[at], grad_log_probs[at]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[at]
        if grad_hidden is not None and shard.group is not None:
            # each rank knows what its own columns ask of the hidden states; the sum over ranks is the gradient
            dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, shard.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
