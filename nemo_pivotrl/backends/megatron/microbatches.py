"""Rows of a batch -> micro-batches of each data-parallel rank, and their tensors.

Every rank is handed the same batch and finds the same plan, so nothing is sent to agree on it. All ranks run equally many
micro-batches, since a mixture of experts and the gradients' reduction are in step over data-parallel ranks; where the rows
do not suffice, a rank runs a filler without rows, whose loss is a connected zero. Micro-batches that run at the same
time on different ranks are of about the same size.

Three forms with the same numbers: rows padded on the right to the widest; packed one after another into one stream
(Transformer Engine's THD), each padded to `multiple` alone; or a forest of shared prefixes (`prefix_tree.py`), one stream, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.prefix_tree import Forest
from nemo_pivotrl.backends.batching import batches
from nemo_pivotrl.backends.tree_attention import Ranges
from nemo_pivotrl.sizing.layout_rules import round_up


@dataclass(frozen=True, slots=True)
class Rows:
    """Tensors of one micro-batch of n rows. B is n padded rows of S tokens, or 1 stream of S tokens."""

    rows: tuple[int, ...]
    """Numbers of the rows in the batch; empty in a filler."""
    tokens: Tensor
    """[B, S] long."""
    positions: Tensor
    """[B, S] long: place of each token in its own sequence."""
    places: Tensor
    """[P] long: index in the flattened [B * S] of the token that makes each prediction."""
    goals: Tensor
    """[P] long: the token predicted."""
    predicts: Tensor
    """[n, T] long: which prediction is each response token's; 0 on padding."""
    seen: Tensor
    """[U] long: index in the flattened [B * S] of every state; none in a forest that was not made for a head."""
    states: Tensor
    """[n, T+1] long: which of `seen` is each state of a row, the prompt's last token first; 0 on padding."""
    mask: Tensor
    """[n, T] bool: response tokens."""
    starts: Tensor | None = None
    """Packed: [n+1] int32, where each sequence begins and the stream ends (Transformer Engine's cu_seqlens). Padding is the
    tail of its own sequence, which nothing before it sees."""
    forest: Forest | None = None
    """What attention and Mamba layers must know of a stream that shares prefixes."""
    ranges: tuple[Ranges, ...] | None = None
    """Of a stream that shares prefixes: the places of each context-parallel rank."""

    @classmethod
    def of(cls, forest: Forest, ranks: int = 1, mirrored: bool = False) -> Rows:
        """The rows of a forest, which is one stream, over context-parallel ranks.

        mirrored: cut as `context_part` cuts one sequence, which megatron-core's Mamba layers ask for; else as `tree_ranges` does.
        """
        stream = forest.tokens[None], forest.positions[None]
        found = forest.places, forest.goals, forest.predicts, forest.seen, forest.states, forest.mask
        length = len(forest.tokens)
        if mirrored and ranks > 1:  # one rank has all places, an odd number of them too
            ranges = tuple(context_ranges(length, rank, ranks) for rank in range(ranks))
        else:
            ranges = tree_ranges((forest.positions + 1).tolist(), ranks)
        return cls(forest.rows, *stream, *found, forest=forest, ranges=ranges)

    def held(self, rank: int, ranks: int) -> Tensor:
        """Places [S / ranks] of a row or stream that a context-parallel rank holds."""
        if self.ranges is not None:
            return torch.cat([torch.arange(first, last) for first, last in self.ranges[rank]])
        starts = [0, self.tokens.shape[1]] if self.starts is None else self.starts.tolist()
        return context_part(starts, rank, ranks)


def schedule(
    groups: Sequence[Sequence[int]],
    lengths: Sequence[int],
    budget: int,
    ranks: int,
    multiple: int = 1,
    packed: bool = False,
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> rows, every row exactly once.

    groups: rows that must stay together (one row each, or the two answers of a pair). lengths: tokens of each row. budget:
    tokens of a micro-batch, padding included; a group that exceeds it alone makes a micro-batch of its own. Depends on
    nothing but its arguments. Raises ValueError when a row is in no group or in several.
    """
    if sorted(row for group in groups for row in group) != list(range(len(lengths))):
        raise ValueError(f"{len(lengths)} rows must each be in exactly one group, got {groups}")
    width = [max((round_up(lengths[row], multiple) for row in group), default=0) for group in groups]
    cost = [sum(round_up(lengths[row], multiple) for row in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda g: (-width[g], groups[g]))
    # from the widest on, so that a padded micro-batch's width is that of its first group
    rows = [len(group) for group in groups]
    held = _first_fit(order, cost, budget) if packed else list(batches(width, budget, order, rows))
    held = _even(held, ranks)
    held.sort(key=lambda members: (-_tokens(members, groups, width, cost, packed), members))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(held), ranks):
        turn = held[start : start + ranks]
        for rank, members in enumerate(turn if start // ranks % 2 == 0 else reversed(turn)):
            plan[rank].append([row for g in sorted(members) for row in groups[g]])
    return plan


def _first_fit(order: Sequence[int], cost: Sequence[int], budget: int) -> list[list[int]]:
    """Groups in streams of at most `budget` tokens, each in the first that has room."""
    held: list[list[int]] = []
    used: list[int] = []
    for g in order:
        place = next((i for i, full in enumerate(used) if full + cost[g] <= budget), len(held))
        if place == len(held):
            held.append([])
            used.append(0)
        held[place].append(g)
        used[place] += cost[g]
    return held


def _even(held: list[list[int]], ranks: int) -> list[list[int]]:
    """As many micro-batches as a multiple of `ranks`, at least one each: those of most groups are halved, then fillers."""
    held = [list(members) for members in held]
    while not held or len(held) % ranks:
        longest = max(range(len(held)), key=lambda i: (len(held[i]), -i), default=None)
        if longest is None or len(held[longest]) < 2:
            held.append([])
            continue
        half = len(held[longest]) // 2
        held[longest : longest + 1] = [held[longest][:half], held[longest][half:]]
    return held


def _tokens(
    members: list[int], groups: Sequence[Sequence[int]], width: list[int], cost: list[int], packed: bool
) -> int:
    if packed:
        return sum(cost[g] for g in members)
    return sum(len(groups[g]) for g in members) * max((width[g] for g in members), default=0)


def lay_out(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    multiple: int = 1,
    packed: bool = False,
    asked: Tensor | None = None,
) -> Rows:
    """Tensors of a micro-batch; prompts and responses are those of `rows`, in their order. No rows give a filler.

    asked: `TokenBatch.asked`; the log-probabilities of other tokens are not computed.

    Raises ValueError for an empty prompt or response: nothing would predict the first token, or there is none.
    """
    if any(not p for p in prompts) or any(not r for r in responses):
        raise ValueError("every row needs a prompt and a response of at least one token")
    n, real = len(rows), [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    longest = max((len(r) for r in responses), default=1)
    padded = [round_up(length, multiple) for length in real]
    if packed:
        starts = [0, *torch.tensor(padded, dtype=torch.long).cumsum(0).tolist()]
        shape = (1, starts[-1] or multiple)
    else:
        size = max(padded, default=multiple)
        starts, shape = [i * size for i in range(n + 1)], (max(n, 1), size)
    tokens, positions = (torch.zeros(shape[0] * shape[1], dtype=torch.long) for _ in range(2))
    real_tokens = torch.zeros(n, longest, dtype=torch.bool)
    last = torch.zeros(n, 1, dtype=torch.long)
    goals = torch.zeros(n, longest, dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first, end = starts[i], starts[i + 1]
        tokens[first : first + real[i]] = torch.tensor([*prompt, *response], dtype=torch.long)
        positions[first:end] = torch.arange(end - first)
        last[i] = first + len(prompt) - 1
        real_tokens[i, : len(response)] = True
        goals[i, : len(response)] = torch.tensor(list(response), dtype=torch.long)
    mask = real_tokens if asked is None else real_tokens & asked[list(rows), :longest]
    states = torch.cat([torch.ones_like(mask[:, :1]), real_tokens], 1)
    place = last + torch.arange(longest + 1)  # of each state in the flattened [B * S]
    bounds = torch.tensor(starts, dtype=torch.int32) if packed and n else None
    return Rows(
        tuple(rows),
        tokens.view(shape),
        positions.view(shape),
        places=place[:, :-1][mask],
        goals=goals[mask],
        predicts=_numbered(mask),
        seen=place[states],
        states=_numbered(states),
        mask=mask,
        starts=bounds,
    )


def _numbered(mask: Tensor) -> Tensor:
    """[n, m] long: how many places of the mask stand before each of them, row by row; 0 outside."""
    return (mask.flatten().cumsum(0).view(mask.shape) - 1).masked_fill(~mask, 0)


def context_part(starts: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Places [S / ranks] of a stream that a context-parallel rank holds: of each sequence piece `rank` and its mirror of
    2 * ranks. Sequence i is starts[i] to starts[i+1]; a padded row is a stream of one.

    The early piece sees little and the late one much, so every rank does the same work in causal attention.
    """
    if ranks == 1:
        return torch.arange(starts[0], starts[-1])
    ranges = [
        (begin + first, begin + last)
        for begin, end in pairwise(starts)
        for first, last in context_ranges(end - begin, rank, ranks)
    ]
    return torch.cat([torch.arange(first, last) for first, last in ranges])


PIECES = (2, 4, 8)
"""How many equal pieces of a stream with shared prefixes a context-parallel rank may hold."""
GAIN = 0.98
"""More pieces are taken where the most loaded rank then has this share of the pairs or less: each one may be one more call a fork."""


def tree_ranges(pairs: Sequence[int], ranks: int) -> tuple[Ranges, ...]:
    """Places of a stream with shared prefixes for each of its context-parallel ranks: equally many tokens, and about equally many
    pairs of query and key. pairs: of each place, the tokens that it sees.

    A sequence's late pieces see most, and mirrored pieces balance it. In a forest what hangs on a trunk sees about the same wherever
    it stands, so pieces are dealt out by what they see: the dearest to ranks in turn, there and back. The length is a multiple of
    2 * ranks.
    """
    if ranks == 1:
        return (((0, len(pairs)),),)
    sums = [0, *accumulate(pairs)]
    best: tuple[float, list[list[int]], int] | None = None
    for each in PIECES:
        size, rest = divmod(len(pairs), each * ranks)
        if rest:
            break
        cost = [sums[(i + 1) * size] - sums[i * size] for i in range(each * ranks)]
        dearest = sorted(range(each * ranks), key=lambda i: (-cost[i], i))
        held: list[list[int]] = [[] for _ in range(ranks)]
        for turn in range(each):
            dealt = dearest[turn * ranks : (turn + 1) * ranks]
            for own, piece in zip(held, dealt if turn % 2 == 0 else reversed(dealt), strict=True):
                own.append(piece)
        worst = max(sum(cost[i] for i in own) for own in held)
        if best is None or worst <= GAIN * best[0]:
            best = worst, held, size
    assert best is not None, f"{len(pairs)} places over {ranks} ranks"
    _, held, size = best
    return tuple(_joined([(i * size, (i + 1) * size) for i in sorted(own)]) for own in held)


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Ascending ranges with those that touch made one."""
    found: list[tuple[int, int]] = []
    for first, last in ranges:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        else:
            found.append((first, last))
    return tuple(found)


def context_ranges(length: int, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The two ranges of one sequence that a context-parallel rank holds. Its length is a multiple of 2 * ranks."""
    piece = length // (2 * ranks)
    mirror = 2 * ranks - 1 - rank
    return (rank * piece, (rank + 1) * piece), (mirror * piece, (mirror + 1) * piece)
