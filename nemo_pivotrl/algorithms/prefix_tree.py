"""Shared prefixes: rows (prompt + response) as a forest of token ids, each token once, and the way back to the rows.

The G samples of a pivot share its prompt, and the pivots of one trajectory are prefixes of each other. A causal model's
state at a token depends on that token and its ancestors alone, so a prefix that several rows share needs one forward and
one backward pass: its gradient is the sum over the rows, which is what autograd gives for a tensor that is used several
times. Loss and gradient are those of the rows run one by one, up to the order of additions.

The forest is a radix tree on ids. A *segment* is a run of tokens that hang on a place of another segment (`parent`,
`offset`) or on nothing; trunks and branches differ only in length. Segments stand in the stream in an order in which
every subtree is contiguous: a segment, then what hangs on it, from its last place to its first. So

    token k is token q itself or one of its ancestors  iff  k <= q < leave[k]

and attention over the forest is made of few rectangles: every segment against itself, causally, and all that hangs on one
place of a segment against that segment's tokens up to this place (`forks`), whole.

Which rows run together: `packs` cuts the rows, in the order of their ids, where the least is repeated. Where a tree does
not fit a pack, or there are more ranks than packs, its trunk is run once for each pack that has a part of it.

A mixture of experts sees the tokens of a shared prefix once. Its output is the same; its routing statistics are not: with
G samples a token of the prompt counts once instead of G times, so load-balancing losses and updates of a router's bias would
weigh responses more. Both are off in this project (`moe_router_bias_update_rate` 0, no auxiliary loss). Who turns them on
gets statistics of the tokens computed, which is also what the experts' load is.

Shapes: `n` rows, `T` response tokens (padded), `S` tokens of the stream, `P` predictions, `U` states.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ids = Sequence[int]


class Segment(NamedTuple):
    """A run of tokens of the stream."""

    start: int
    """Place of its first token in the stream."""
    length: int
    offset: int
    """Position of its first token in the rows it belongs to: how many tokens stand before it."""
    parent: int
    """Number of the segment that the token before it belongs to; -1: it begins its rows."""


class Fork(NamedTuple):
    """All that hangs on one place of a segment: queries first..last-1 of the stream see keys begin..end-1, whole."""

    first: int
    last: int
    begin: int
    end: int


def on_device(made: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device."""
    values = ((f.name, getattr(made, f.name)) for f in fields(made))
    return replace(made, **{name: x.to(device) for name, x in values if isinstance(x, Tensor)})


@dataclass(frozen=True, slots=True)
class Forest:
    """One pack: its stream of S tokens, and where the rows are in it."""

    rows: tuple[int, ...]
    """Numbers of the n rows; empty in a filler."""
    segments: tuple[Segment, ...]
    """In the order of the stream. Padding is a segment of its own, the last one."""
    forks: tuple[Fork, ...]
    tokens: Tensor
    """[S] long."""
    positions: Tensor
    """[S] long: place of each token in its own row."""
    leave: Tensor
    """[S] long: the place behind the last descendant of each token."""
    places: Tensor
    """[P] long: place of the token that predicts; each pair with its `goals` stands once, however many rows want it."""
    goals: Tensor
    """[P] long: the token predicted."""
    predicts: Tensor
    """[n, T] long: which prediction is each response token's; 0 on padding."""
    seen: Tensor
    """[U] long: places of the states; none unless the layout was asked to keep the responses' last tokens."""
    states: Tensor
    """[n, T+1] long: which of `seen` is each state of a row, the prompt's last token first; 0 on padding."""
    mask: Tensor
    """[n, T] bool: response tokens."""

    def to(self, device: torch.device) -> Forest:
        """The same with its tensors on a device."""
        moved: Forest = on_device(self, device)
        return moved

    def pick(self, found: Tensor) -> Tensor:
        """What was found for the predictions [P], row by row [n, T]; 0 on padding."""
        return found[self.predicts].masked_fill(~self.mask, 0.0)

    def ancestors(self) -> Tensor:
        """[S] long: place of the token before each one in its row, -1 for a row's first."""
        before = torch.arange(-1, len(self.tokens) - 1, device=self.tokens.device)
        for segment in self.segments:
            before[segment.start] = self.place_before(segment)
        return before

    def place_before(self, segment: Segment) -> int:
        """Place in the stream of the token that a segment hangs on, -1 where it begins its rows."""
        if segment.parent < 0:
            return -1
        above = self.segments[segment.parent]
        return above.start + segment.offset - above.offset - 1


def visible(forest: Forest) -> Tensor:
    """[S, S] bool, True where query (row) may look at key (column). The whole truth, for small streams."""
    place = torch.arange(len(forest.tokens), device=forest.tokens.device)
    return (place[None] <= place[:, None]) & (place[:, None] < forest.leave[None])


# ---- which rows run together ----


def packs(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    budget: int,
    ranks: int = 1,
    groups: Sequence[Sequence[int]] | None = None,
    multiple: int = 1,
    keep_last: bool = False,
    pairs_per_token: float = 6144.0,
) -> list[list[list[int]]]:
    """[rank][pack] -> rows, every row exactly once; all ranks have equally many packs, some of them perhaps empty.

    prompts, responses: of each row. budget: tokens of a pack's stream, padding to `multiple` included; a group that
    exceeds it alone makes a pack of its own. groups: rows that must stay together, in this order; one each if None. Groups are
    taken in the order of their ids and cut where the fewest tokens are repeated, then where that makes fewer packs. Cost balances
    ranks: tokens, and pairs of query and key at `pairs_per_token` to a token (a layer's matrix products cost a token about
    24 h^2 operations and a pair 4 h, so 6 h). Depends on nothing but its arguments. Raises ValueError for a row in no group
    or in several, and for an empty prompt or response.
    """
    _check(prompts, responses)
    units = [(row,) for row in range(len(prompts))] if groups is None else [tuple(group) for group in groups]
    if sorted(row for unit in units for row in unit) != list(range(len(prompts))):
        raise ValueError(f"{len(prompts)} rows must each be in exactly one group, got {groups}")
    run = _Run.of([_ids(p, r, keep_last) for p, r in zip(prompts, responses, strict=True)], units, pairs_per_token)
    room = max(budget // multiple * multiple, 1)
    cuts = _even(run, _cut(run, room), ranks)
    cuts.sort(key=lambda cut: (-run.cost(*cut), cut))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for first in range(0, len(cuts), ranks):
        turn = cuts[first : first + ranks]
        for rank, (a, b) in enumerate(turn if first // ranks % 2 == 0 else reversed(turn)):
            plan[rank].append([row for unit in run.units[a:b] for row in unit])
    return plan


@dataclass(frozen=True, slots=True)
class _Run:
    """Units of rows in the order of their ids, with sums that give the cost of any consecutive ones at once."""

    units: list[tuple[int, ...]]
    common: list[int]
    """Tokens that a unit shares with the one before it."""
    tokens: list[int]
    """Of the units before the i-th, each without what it shares; one more number than units."""
    pairs: list[int]
    """Likewise, pairs of query and key."""
    pairs_per_token: float

    @classmethod
    def of(cls, rows: Sequence[array[int]], units: Sequence[tuple[int, ...]], pairs_per_token: float) -> _Run:
        order, shared = _sorted(rows)
        rank = {row: i for i, row in enumerate(order)}
        units = sorted(units, key=lambda unit: min(rank[row] for row in unit))
        tokens, pairs, common = [0], [0], []
        before: list[int] = []
        for unit in units:
            # with units of several rows this may miss some sharing between units, never claim too much
            own = sorted(unit, key=rank.__getitem__)
            above = _shared(rows[before[-1]], rows[own[0]]) if before else 0
            within = [above] + [_least(shared, rank[a], rank[b]) for a, b in pairwise(own)]
            common.append(above)
            tokens.append(tokens[-1] + sum(len(rows[row]) - cut for row, cut in zip(own, within, strict=True)))
            pairs.append(
                pairs[-1] + sum(_below(len(rows[row])) - _below(cut) for row, cut in zip(own, within, strict=True))
            )
            before = own
        return cls(list(units), common, tokens, pairs, pairs_per_token)

    def size(self, a: int, b: int) -> int:
        """Tokens of units a..b-1 run together."""
        return self.tokens[b] - self.tokens[a] + self.common[a] if a < b else 0

    def cost(self, a: int, b: int) -> float:
        if a >= b:
            return 0.0
        return self.size(a, b) + (self.pairs[b] - self.pairs[a] + _below(self.common[a])) / self.pairs_per_token


def _below(length: int) -> int:
    return length * (length + 1) // 2


def _cut(run: _Run, room: int) -> list[tuple[int, int]]:
    """Consecutive units in packs of at most `room` tokens, so that the fewest tokens are run in all."""
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # (tokens, packs, where the last pack begins) of the first i units
    for end in range(1, len(run.units) + 1):
        begin = end - 1  # a unit that exceeds the room alone is a pack of its own
        found = (best[begin][0] + run.size(begin, end), best[begin][1] + 1, begin)
        while begin > 0 and run.size(begin - 1, end) <= room:
            begin -= 1
            found = min(found, (best[begin][0] + run.size(begin, end), best[begin][1] + 1, begin))
        best.append(found)
    cuts, end = [], len(run.units)
    while end:
        cuts.append((best[end][2], end))
        end = best[end][2]
    return cuts[::-1]


def _even(run: _Run, cuts: list[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """As many packs as a multiple of `ranks`, at least one each: the most expensive are cut in two, then fillers are added."""
    while not cuts or len(cuts) % ranks:
        wide = [cut for cut in cuts if cut[1] - cut[0] > 1]
        if not wide:
            cuts.append((0, 0))
            continue
        a, b = max(wide, key=lambda cut: (run.cost(*cut), cut))
        at = min(range(a + 1, b), key=lambda at: (max(run.cost(a, at), run.cost(at, b)), at))
        cuts[cuts.index((a, b))] = (a, at)
        cuts.append((at, b))
    return cuts


# ---- the layout of a pack ----


@dataclass(slots=True)
class _Node:
    """A segment while the tree grows."""

    parent: int
    offset: int
    ids: array[int]
    children: list[int]


Path = list[tuple[int, int]]
"""(node, position behind its last token in this row) from a row's beginning to its end."""


def lay_out(
    rows: Sequence[int],
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    multiple: int = 1,
    keep_last: bool = False,
    share: bool = True,
) -> Forest:
    """The stream of a pack; prompts and responses are those of `rows`, in their order. No rows give a filler.

    A response's last token predicts nothing and is left out, unless `keep_last`: a head on states wants it. multiple: S is
    padded to a multiple of it. share False gives every row a segment of its own: the naive layout, packed.

    Raises ValueError for an empty prompt or response: nothing would predict the first token, or there is none.
    """
    _check(prompts, responses)
    ids = [_ids(p, r, keep_last) for p, r in zip(prompts, responses, strict=True)]
    nodes, paths = _grow(ids, [len(p) for p in prompts], share)
    segments, forks, order, leave = _stream(nodes, multiple)
    stream = array("i")
    for number in order:
        stream.extend(nodes[number].ids)
    stream.extend([0] * (len(leave) - len(stream)))
    positions = torch.cat([torch.arange(s.offset, s.offset + s.length) for s in segments])
    starts = {number: segment for number, segment in zip(order, segments, strict=False)}

    n, longest = len(rows), max((len(r) for r in responses), default=1)
    wanted, states = torch.zeros(n, longest, dtype=torch.long), torch.zeros(n, longest + 1, dtype=torch.long)
    targets, mask = torch.zeros_like(wanted), torch.zeros(n, longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first, count = len(prompt) - 1, len(response)
        places = _places(paths[i], starts, first)
        wanted[i, :count] = places[:count]
        targets[i, :count] = torch.tensor(list(response), dtype=torch.long)
        mask[i, :count] = True
        if keep_last:
            states[i, : count + 1] = places
    width = int(targets.max()) + 1 if n else 1
    keys, predicts = torch.unique((wanted * width + targets)[mask], return_inverse=True)
    seen, state_of = torch.unique(states[_and_one(mask)] if keep_last else states.new_zeros(0), return_inverse=True)
    return Forest(
        rows=tuple(rows),
        segments=tuple(segments),
        forks=tuple(forks),
        tokens=torch.frombuffer(stream, dtype=torch.int32).long(),
        positions=positions,
        leave=leave,
        places=keys // width,
        goals=keys % width,
        predicts=torch.zeros_like(wanted).masked_scatter(mask, predicts),
        seen=seen,
        states=torch.zeros_like(states).masked_scatter(_and_one(mask), state_of) if keep_last else states,
        mask=mask,
    )


def _and_one(mask: Tensor) -> Tensor:
    """[n, T+1] bool: the states of rows whose tokens are [n, T]."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


def _grow(rows: Sequence[array[int]], prompts: Sequence[int], share: bool) -> tuple[list[_Node], list[Path]]:
    """Nodes, and the path of each row. Rows with long prompts come first, so that a trajectory's trunk is one node."""
    nodes: list[_Node] = []
    paths: list[Path] = [[] for _ in rows]
    order, shared = _sorted(rows)
    laid: list[int] = []
    for rank in sorted(range(len(rows)), key=lambda rank: (-prompts[order[rank]], rank)):
        row, at, common, path = order[rank], bisect_left(laid, rank), 0, []
        for neighbour in laid[max(at - 1, 0) : at + 1] if share else ():
            both = _least(shared, *sorted((neighbour, rank)))
            if both > common:
                common, path = both, paths[order[neighbour]]
        paths[row] = _cut_path(path, common)
        if common < len(rows[row]):
            parent = paths[row][-1][0] if paths[row] else -1
            if parent >= 0:
                nodes[parent].children.append(len(nodes))
            paths[row].append((len(nodes), len(rows[row])))
            nodes.append(_Node(parent, common, rows[row][common:], []))
        insort(laid, rank)
    return nodes, paths


def _cut_path(path: Path, end: int) -> Path:
    """A path's part before position `end`."""
    kept: Path = []
    begin = 0
    for node, last in path:
        if begin >= end:
            break
        kept.append((node, min(last, end)))
        begin = last
    return kept


def _stream(nodes: Sequence[_Node], multiple: int) -> tuple[list[Segment], list[Fork], list[int], Tensor]:
    """Segments in the order of the stream, forks, which node is which segment, and `leave`."""
    order: list[int] = []
    todo = [number for number in range(len(nodes) - 1, -1, -1) if nodes[number].parent < 0]
    while todo:
        number = todo.pop()
        order.append(number)
        nodes[number].children.sort(key=lambda child: (-nodes[child].offset, child))
        todo.extend(reversed(nodes[number].children))
    starts = dict(zip(order, accumulate((len(nodes[number].ids) for number in order), initial=0), strict=False))
    size = sum(len(node.ids) for node in nodes)
    padded = max(-(-size // multiple), 1) * multiple
    leave = torch.empty(padded, dtype=torch.long)
    leave[size:] = padded
    ends: dict[int, int] = {}  # behind everything that hangs on a node
    forks: list[Fork] = []
    for number in reversed(order):
        node, start = nodes[number], starts[number]
        ends[number] = start + len(node.ids)
        leave[start : ends[number]] = ends[number]
        here: list[Fork] = []
        for child in node.children:  # from the last place to the first, so each one's range begins where the last ended
            until = start + nodes[child].offset - node.offset
            if here and here[-1].end == until:
                here[-1] = here[-1]._replace(last=ends[child])
            else:
                here.append(Fork(starts[child], ends[child], start, until))
            ends[number] = ends[child]
            leave[start:until] = ends[child]
        forks += here
    rank = {number: i for i, number in enumerate(order)}
    segments = [
        Segment(starts[number], len(nodes[number].ids), nodes[number].offset, rank.get(nodes[number].parent, -1))
        for number in order
    ]
    if padded > size:
        segments.append(Segment(size, padded - size, 0, -1))
    return segments, sorted(forks), order, leave


def _places(path: Path, starts: dict[int, Segment], first: int) -> Tensor:
    """Places in the stream of a row's tokens, from position `first` on."""
    parts, begin = [], 0
    for node, end in path:
        segment = starts[node]
        if end > first:
            parts.append(torch.arange(max(begin, first), end) + segment.start - segment.offset)
        begin = end
    return torch.cat(parts)


# ---- ids ----


def _check(prompts: Sequence[Ids], responses: Sequence[Ids]) -> None:
    if any(not p for p in prompts) or any(not r for r in responses):
        raise ValueError("every row needs a prompt and a response of at least one token")


def _ids(prompt: Ids, response: Ids, keep_last: bool) -> array[int]:
    ids = array("i", prompt)
    ids.extend(array("i", response if keep_last else response[:-1]))
    return ids


def _sorted(rows: Sequence[array[int]]) -> tuple[list[int], list[int]]:
    """Rows in an order in which those with a common prefix are neighbours, and how much each shares with the one before.

    The bytes of the ids decide: any order of fixed-width keys keeps a common prefix together, and bytes compare fast.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes())
    return order, [0] + [_shared(rows[a], rows[b]) for a, b in pairwise(order)]


def _shared(a: array[int], b: array[int]) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    if size == 0:
        return 0
    differs = torch.frombuffer(a, dtype=torch.int32)[:size] != torch.frombuffer(b, dtype=torch.int32)[:size]
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else size


def _least(shared: Sequence[int], low: int, high: int) -> int:
    """What two rows share, by their ranks in `_sorted`'s order."""
    return min(shared[low + 1 : high + 1])


def token_ratio(
    prompts: Sequence[Ids], responses: Sequence[Ids], plan: Sequence[Sequence[int]], keep_last: bool = False
) -> float:
    """Tokens of the rows one by one over those of their packs, without padding; 1 is no saving."""
    run = 0
    for rows in plan:
        ids = [_ids(prompts[row], responses[row], keep_last) for row in rows]
        run += sum(map(len, ids)) - sum(_sorted(ids)[1]) if ids else 0
    return sum(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) / max(run, 1)


def prompt_saving(prompts: Sequence[Ids]) -> float:
    """Share of the prompts' tokens that running them together saves, in [0, 1)."""
    ids = [array("i", prompt) for prompt in prompts]
    return sum(_sorted(ids)[1]) / max(sum(map(len, ids)), 1) if ids else 0.0
