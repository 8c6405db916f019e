"""Log-probabilities and entropy of chosen tokens from logits whose vocabulary is cut over a tensor-parallel group.

Shapes: `M` tokens (any leading shape is kept), `V` columns of this rank's shard, `H` hidden size. Everything is computed
in float32 (or float64, where that comes in) and in nats. The caller's logits are never written to. `group` None means
that the vocabulary is whole on this rank: it never means "the world".

Two forms with the same numbers. `log_probs_of` takes logits. `chunked_log_probs` takes hidden states and the LM head's
weight shard, makes the logits a chunk of tokens at a time and makes them once more in the backward pass, so that fp32
logits of a whole sequence never exist. Either way a call costs two small all-reduces forward, however many chunks, and
backward only the chunked form communicates: the hidden states' gradient is a sum over the vocabulary, hence over ranks.

A target below 0 is ignored: log-probability 0, no gradient. One at or above `vocab_size` gives NaN, which the gradient
check finds, instead of a number that looks like any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    spread: Tensor
    """Sum of exp(logit - top) * (logit - top)."""
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


def log_probs_of(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log-probability, entropy or None) [...] of `targets` [...] under softmax(logits / temperature).

    logits [..., V]: this rank's shard; targets hold global token ids and are the same on all ranks of the group, as are
    the results. Gradients reach the logits of this rank. Raises ValueError as `shard_of` does.
    """
    shard = shard_of(logits.shape[-1], group, vocab_size, temperature)
    flat = logits.reshape(-1, logits.shape[-1])
    log_probs, entropy = _FromLogits.apply(flat, targets.reshape(-1), shard, with_entropy)
    return log_probs.view(targets.shape), entropy.view(targets.shape) if with_entropy else None


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    chunk: int,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `log_probs_of`, with logits = hidden @ weight.T made `chunk` tokens at a time.

    hidden [..., H], the same on every rank of the group; with `sequence_parallel` the rank's consecutive part of the
    first dimension. weight [V, H]: this rank's shard. targets [...]: of the whole sequence. The matrix products run in
    hidden's dtype, everything after them in float32; the weight's gradient is summed over chunks in float32.
    """
    if chunk < 1:
        raise ValueError(f"a chunk holds at least one token, got {chunk}")
    shard = shard_of(weight.shape[0], group, vocab_size, temperature)
    gathered = sequence_parallel and group is not None
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat.shape[0] * (dist.get_world_size(group) if gathered else 1)
    if tokens != targets.numel():
        raise ValueError(f"hidden states of {tokens} tokens for {targets.numel()} targets")
    log_probs, entropy = _FromHidden.apply(flat, weight, targets.reshape(-1), shard, chunk, with_entropy, gathered)
    return log_probs.view(targets.shape), entropy.view(targets.shape) if with_entropy else None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled(logits: Tensor, shard: Shard) -> Tensor:
    """Logits [M, V] over temperature, padding columns at -inf; a tensor of its own wherever it differs."""
    x = _wide(logits)
    if shard.temperature != 1.0:
        x = x / shard.temperature
    if shard.real < x.shape[1]:
        x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= shard.real, -torch.inf)
    return x


def _look(logits: Tensor, targets: Tensor, shard: Shard, with_entropy: bool) -> _Found:
    """Statistics of this rank's columns."""
    x = _scaled(logits, shard)
    lowest = torch.finfo(x.dtype).min  # a shard of padding alone has no largest logit
    top = x.amax(1).clamp(min=lowest) if x.numel() else x.new_full((x.shape[0],), lowest)
    place, mine = _place(targets, shard)
    chosen = x.gather(1, place[:, None])[:, 0].masked_fill(~mine, 0.0)
    apart = _less(x, top, logits)
    if with_entropy:
        weight = apart.exp()
        total, spread = weight.sum(1), weight.mul_(apart.masked_fill_(apart.isneginf(), 0.0)).sum(1)
    else:
        total = apart.exp_().sum(1)
        spread = torch.zeros_like(total)
    return _Found(top, total, spread, chosen, mine.to(total.dtype))


def _less(x: Tensor, number: Tensor, logits: Tensor) -> Tensor:
    """x [M, V] minus number [M], in place unless x is the caller's own tensor: at these sizes every copy counts."""
    return x - number[:, None] if x is logits else x.sub_(number[:, None])


def _place(targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Local column [M] of each target, and whether it is this rank's."""
    local = targets - shard.first
    mine = (local >= 0) & (local < shard.real)
    return local.masked_fill(~mine, 0), mine


def _merge(found: _Found, targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, log of the normaliser) [M] over all ranks: one MAX and one SUM of a few numbers."""
    top = found.top
    if shard.group is not None:
        top = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, shard.group)
    shift = (found.top - top).masked_fill(found.total == 0, 0.0)
    fade = shift.exp()
    sums = torch.stack([found.total * fade, fade * (found.spread + shift * found.total), found.chosen, found.owners])
    if shard.group is not None:
        dist.all_reduce(sums, dist.ReduceOp.SUM, shard.group)
    total, spread, chosen, owners = sums.unbind(0)
    normaliser = top + total.log()
    log_probs = torch.where(owners > 0, chosen - normaliser, torch.full_like(chosen, torch.nan))
    return log_probs.masked_fill(targets < 0, 0.0), total.log() - spread / total, normaliser


def _grad_logits(
    logits: Tensor,
    targets: Tensor,
    shard: Shard,
    normaliser: Tensor,
    grad_log_probs: Tensor,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [M, V] with respect to this rank's logits; needs nothing from other ranks.

    d log p(y) / dx_j = [j = y] - p_j and dH / dx_j = -p_j (log p_j + H), both over the temperature.
    """
    log_p = _less(_scaled(logits, shard), normaliser, logits)
    pull = -grad_log_probs.masked_fill(targets < 0, 0.0)
    if entropy is None or grad_entropy is None:
        grad = log_p.exp_().mul_(pull[:, None])
    else:
        grad = log_p.exp()
        toward = log_p.masked_fill_(log_p.isneginf(), 0.0).add_(entropy[:, None]).mul_(-grad_entropy[:, None])
        grad = grad.mul_(toward.add_(pull[:, None]))
    place, mine = _place(targets, shard)
    grad.scatter_add_(1, place[:, None], (-pull).masked_fill(~mine, 0.0)[:, None])
    return grad.div_(shard.temperature) if shard.temperature != 1.0 else grad


class _FromLogits(torch.autograd.Function):
    """Keeps the logits as they came (bf16 stays bf16) and one number a token; the softmax is made again backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: Shard, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = _look(logits, targets, shard, with_entropy)
        log_probs, entropy, normaliser = _merge(found, targets, shard)
        ctx.shard, ctx.with_entropy = shard, with_entropy
        ctx.save_for_backward(logits, targets, normaliser, entropy)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, normaliser, entropy = ctx.saved_tensors
        entropy = entropy if ctx.with_entropy else None
        grad = _grad_logits(logits, targets, ctx.shard, normaliser, grad_log_probs, entropy, grad_entropy)
        return grad.to(logits.dtype), None, None, None


class _FromHidden(torch.autograd.Function):
    """Keeps hidden states, weight and one number a token; logits live for one chunk at a time, both ways."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: Shard,
        chunk: int,
        with_entropy: bool,
        gathered: bool,
    ) -> tuple[Tensor, Tensor | None]:
        whole = _gather(hidden, shard.group) if gathered else hidden
        pieces = [
            _look(part @ weight.t(), goal, shard, with_entropy)
            for part, goal in zip(whole.split(chunk), targets.split(chunk), strict=True)
        ]
        found = _Found(*(torch.cat(fields) for fields in zip(*pieces, strict=True)))
        log_probs, entropy, normaliser = _merge(found, targets, shard)
        ctx.shard, ctx.chunk, ctx.with_entropy, ctx.gathered = shard, chunk, with_entropy, gathered
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        shard: Shard = ctx.shard
        whole = _gather(hidden, shard.group) if ctx.gathered else hidden
        grad_hidden = torch.empty_like(whole) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight).dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, whole.shape[0], ctx.chunk):
            at = slice(start, start + ctx.chunk)
            pushed = (entropy[at], grad_entropy[at]) if ctx.with_entropy and grad_entropy is not None else (None, None)
            logits = whole[at] @ weight.t()
            grad = _grad_logits(logits, targets[at], shard, normaliser[at], grad_log_probs[at], *pushed)
            grad = grad.to(whole.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight += grad.t() @ whole[at]
        if grad_hidden is not None and shard.group is not None:
            # each rank knows what its own columns ask of the hidden states; the sum over ranks is the gradient
            if ctx.gathered:
                grad_hidden = _reduce_scatter(grad_hidden, shard.group)
            else:
                dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, shard.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Parts [m, H] of all ranks, one after another."""
    whole = part.new_empty(part.shape[0] * dist.get_world_size(group), part.shape[1])
    dist.all_gather_into_tensor(whole, part.contiguous(), group)
    return whole


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part [m, H] of the sum over ranks."""
    part = whole.new_empty(whole.shape[0] // dist.get_world_size(group), whole.shape[1])
    dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.SUM, group)
    return part
