"""Mamba-2 layers over a forest of shared prefixes (`prefix_tree.py`): states fork where branches leave. Both backends use it.

The convolution reads the last K-1 tokens of a row, wherever in the stream they are. The scan is cut where something
hangs: each piece starts from the state in which the piece before it ended, whichever segment that is in, and gradients
flow back through these states. Branches without branches of their own that leave at one place are one batch, padded on the
right, where a causal scan does not look; every other piece is a call of its own.

Shapes: the stream is one batch row of S tokens; C channels, K the convolution's width, H heads, P channels of a head,
G groups, N states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from nemo_pivotrl.algorithms.prefix_tree import Forest

Scan = Callable[..., Any]
"""mamba_ssm's `mamba_chunk_scan_combined` or a twin: (x [B, L, H, P], dt [B, L, H], A, B [B, L, G, N], C, chunk_size,
initial_states=[B, H, P, N], return_final_states=) -> y [B, L, H, P] or (y, final states [B, H, P, N])."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, forest: Forest) -> Tensor:
    """Depthwise causal convolution along every row: x [1, S, C], weight [C, K] to [1, S, C], without activation."""
    width = weight.shape[1]
    padded = functional.pad(x.transpose(1, 2), (width - 1, 0))
    out = functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    first = [s.start + i for s in forest.segments for i in range(min(width - 1, s.length))]
    at = torch.tensor(first, device=x.device)  # only there is the stream's window not the row's
    before, window = forest.ancestors().to(x.device), [at]
    for _ in range(width - 1):
        window.append(torch.where(window[-1] >= 0, before[window[-1].clamp(min=0)], window[-1]))
    place = torch.stack(window[::-1], 1)  # [m, K], -1 before a row's beginning
    tokens = x[0, place.clamp(min=0)] * (place >= 0)[..., None].to(x.dtype)
    mended = torch.einsum("mkc,ck->mc", tokens, weight)
    return out.index_copy(1, at, (mended if bias is None else mended + bias)[None])


class Piece(NamedTuple):
    """Tokens first..last-1 of the stream, of one segment, with nothing hanging on them but on the last."""

    first: int
    last: int
    before: int
    """Number of the piece whose end is its beginning; -1: none."""
    inner: bool
    """Some piece begins where it ends."""


def pieces(forest: Forest) -> list[Piece]:
    """The pieces in the order of the stream; a piece stands behind the one it begins from."""
    cuts: dict[int, set[int]] = {i: {s.start + s.length} for i, s in enumerate(forest.segments)}
    for segment in forest.segments:
        if segment.parent >= 0:
            cuts[segment.parent].add(forest.place_before(segment) + 1)
    ends: dict[int, int] = {}
    found: list[tuple[int, int, int]] = []
    for i, segment in enumerate(forest.segments):
        begin, before = segment.start, ends.get(forest.place_before(segment) + 1, -1) if segment.parent >= 0 else -1
        for end in sorted(cuts[i]):
            found.append((begin, end, before))
            begin, before = end, len(found) - 1
            ends[end] = before
    used = {before for _, _, before in found}
    return [Piece(*piece, i in used) for i, piece in enumerate(found)]


def scan(run: Scan, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, forest: Forest, **fixed: Any) -> Tensor:
    """The state-space scan along every row: x [1, S, H, P], dt [1, S, H], b and c [1, S, G, N] to [1, S, H, P].

    fixed: what `run` takes beside (A, D, chunk_size, ...), the same for every token; no gate, which is the caller's.
    """
    cut = pieces(forest)
    inputs = (x[0], dt[0], b[0], c[0])
    ends: dict[int, Tensor] = {}  # state [1, H, P, N] behind each inner piece
    out: dict[int, Tensor] = {}
    waiting: dict[int, list[int]] = {}
    for number, piece in enumerate(cut):
        if not piece.inner:
            waiting.setdefault(piece.before, []).append(number)
            continue
        part = slice(piece.first, piece.last)
        given = [t[None, part] for t in inputs]
        y, ends[number] = _run(run, given, ends.get(piece.before), True, fixed)
        out[number] = y[0]
    for before, numbers in waiting.items():
        given = [pad_sequence([t[cut[n].first : cut[n].last] for n in numbers], batch_first=True) for t in inputs]
        state = ends.get(before)
        y = _run(run, given, None if state is None else state.expand(len(numbers), -1, -1, -1), False, fixed)
        for i, number in enumerate(numbers):
            out[number] = y[i, : cut[number].last - cut[number].first]
    return torch.cat([out[number] for number in range(len(cut))])[None]


def _run(run: Scan, given: list[Tensor], state: Tensor | None, final: bool, fixed: dict[str, Any]) -> Any:
    x, dt, b, c = (t.contiguous() for t in given)
    state = None if state is None else state.contiguous()
    return run(x, dt, B=b, C=c, initial_states=state, return_final_states=final, **fixed)
