"""Attention over a forest of shared prefixes by attention kernels for packed sequences ("varlen") on GPUs.

One causal call takes all segments, each a sequence of its own. One call for each fork takes what hangs on one place of a segment as
queries, and the segment's tokens up to this place as keys, whole. The calls' outputs are put together by their log-sum-exp.

Kernels give the log-sum-exp without a gradient, so that autograd cannot differentiate the sum of calls. It need not: with the
output and log-sum-exp of the whole in place of a call's own, a kernel's backward pass gives the call's part of the whole gradient, as
in ring attention (Liu et al. 2023, arXiv 2310.01889), since softmax's gradient knows other keys by these two alone.

The kernels that are known, by their names in a recipe: see `KERNELS`. Each is used through what its library itself calls beneath
autograd; `tests/trace/test_varlen.py` holds the arguments against these libraries' own sources.

Shapes: query [Q, H, D], key and value [S, K, D] with H a multiple of K; log-sum-exp [H, Q] in float32. Sequence i of n has
places bounds[i] to bounds[i + 1] of its tensor, int32 [n + 1]; the longest has `longest` tokens.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which tokens of queries and keys are which sequence of a call."""

    queries: Tensor
    keys: Tensor
    """Bounds, int32 [n + 1] each."""
    longest_query: int
    longest_key: int
    causal: bool
    """A query sees the keys up to its own place in its sequence; False: all keys of it."""


class Kernel(Protocol):
    """A kernel for packed sequences."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, of: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """(output [Q, H, D], log-sum-exp [H, Q])."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        top: Tensor,
        of: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value for the output's gradient [Q, H, D]; out and log-sum-exp `top` are those of the whole."""


class TorchFlash:
    """PyTorch's own FlashAttention, by the operators beneath `torch.nn.attention.varlen`, which has no backward pass of its own for
    another log-sum-exp."""

    def __init__(self) -> None:
        self.run = torch.ops.aten._flash_attention_forward
        self.back = torch.ops.aten._flash_attention_backward

    def forward(self, query: Tensor, key: Tensor, value: Tensor, of: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        bounds = of.queries, of.keys, of.longest_query, of.longest_key
        out, top, *_ = self.run(query, key, value, *bounds, 0.0, of.causal, False, scale=scale)
        return out, top

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        top: Tensor,
        of: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounds = of.queries, of.keys, of.longest_query, of.longest_key
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
        none = torch.empty(0, device=query.device)
        given = grad, query, key, value, out, top, *bounds, 0.0, of.causal, state, none
        found: tuple[Tensor, Tensor, Tensor] = self.back(*given, scale=scale)
        return found


class Flash2:
    """The package `flash-attn` (FlashAttention 2), from 2.7 on."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface as library

        self.run, self.back = library._wrapped_flash_attn_varlen_forward, library._wrapped_flash_attn_varlen_backward

    def forward(self, query: Tensor, key: Tensor, value: Tensor, of: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        bounds = of.queries, of.keys, of.longest_query, of.longest_key
        out, top, *_ = self.run(query, key, value, *bounds, 0.0, scale, causal=of.causal)
        return out, top

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        top: Tensor,
        of: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounds = of.queries, of.keys, of.longest_query, of.longest_key
        made = _like(query), _like(key), _like(value)
        rest = 0.0, scale, of.causal, -1, -1, 0.0, None, False
        self.back(grad, query, key, value, out, top, *made, *bounds, *rest)
        return made


class Flash3:
    """FlashAttention 3 (the module `flash_attn_interface` that its sources under `hopper` install), for Hopper.

    Arguments go by their places: their names differ between its versions.
    """

    def __init__(self) -> None:
        import flash_attn_interface as library

        self.run, self.back = library._flash_attn_forward, library._flash_attn_backward

    def forward(self, query: Tensor, key: Tensor, value: Tensor, of: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        bounds = of.queries, of.keys, None, None, None, of.longest_query, of.longest_key
        out, top, *_ = self.run(query, key, value, *(None,) * 4, *bounds, *(None,) * 9, scale, of.causal)
        return out, top

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        top: Tensor,
        of: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = _like(query), _like(key), _like(value)
        bounds = of.queries, of.keys, None, None, of.longest_query, of.longest_key
        self.back(grad, query, key, value, out, top, *bounds, *made, scale, of.causal)
        return made


class TransformerEngine:
    """Transformer Engine's fused attention, which is cuDNN's. Its log-sum-exp is [Q, H, 1]; cuDNN before 9.6 pads it, and is refused.

    Releases before 2.15 have no formats of their own for outputs and gradients, and ask for the gradients' type.
    """

    def __init__(self) -> None:
        from transformer_engine.pytorch.cpp_extensions import fused_attn as library

        self.run, self.back = library.fused_attn_fwd, library.fused_attn_bwd
        self.sort = library.FusedAttnBackend["F16_arbitrary_seqlen"]
        self.formats = "o_format" in inspect.signature(self.run).parameters
        self.types = None
        if "dqkv_dtype" in inspect.signature(self.back).parameters:
            from transformer_engine.pytorch.constants import TE_DType

            self.types = TE_DType

    def forward(self, query: Tensor, key: Tensor, value: Tensor, of: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        out, kept, *_ = self.run(is_training=True, q=query, k=key, v=value, **self._of(query, of, scale))
        if kept[0].dim() != 3:
            raise RuntimeError(
                f"cuDNN's log-sum-exp of packed sequences is {tuple(kept[0].shape)}: 9.6 or newer is needed"
            )
        return out, kept[0][:, :, 0].T.contiguous()

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        top: Tensor,
        of: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = [top.T.contiguous()[:, :, None], torch.zeros(2, dtype=torch.int64, device=query.device)]
        given: dict[str, Any] = {"q": query, "k": key, "v": value, "o": out, "d_o": grad, "aux_ctx_tensors": kept}
        if self.formats:
            given |= {"do_format": "thd", "dqkv_layout": "thd_thd_thd"}
        if self.types is not None:
            given["dqkv_dtype"] = self.types[query.dtype]
        found = self.back(**given, **self._of(query, of, scale))
        return found[0], found[1], found[2]

    def _of(self, query: Tensor, of: Sequences, scale: float) -> dict[str, Any]:
        """Arguments that both directions share."""
        return {
            "max_seqlen_q": of.longest_query,
            "max_seqlen_kv": of.longest_key,
            "cu_seqlens_q": of.queries,
            "cu_seqlens_kv": of.keys,
            "cu_seqlens_q_padded": of.queries,
            "cu_seqlens_kv_padded": of.keys,
            "fake_dtype": query.dtype,
            "fused_attention_backend": self.sort,
            "attn_scale": scale,
            "qkv_layout": "thd_thd_thd",
            **({"o_format": "thd"} if self.formats else {}),
            "attn_mask_type": "padding_causal" if of.causal else "padding",
            "window_size": (-1, 0) if of.causal else (-1, -1),
        }


KERNELS: dict[str, type[Any]] = {
    "torch": TorchFlash,
    "flash_attn_2": Flash2,
    "flash_attn_3": Flash3,
    "transformer_engine": TransformerEngine,
}
"""By their names in a recipe. Making one imports its library and raises ImportError where it is not there."""


@functools.cache
def kernel(name: str) -> Kernel:
    made: Kernel = KERNELS[name]()
    return made


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Calls:
    """What is called for the queries that are held of a forest."""

    own: tuple[tuple[int, int], ...]
    """Places first..last-1 of the keys of all squares, one range behind another."""
    squares: Sequences
    forks: tuple[tuple[slice, slice, Sequences], ...]
    """(queries among those held, keys in the stream, both as one sequence)."""


def calls(
    squares: tuple[tuple[int, int, int, int], ...], whole: tuple[tuple[int, int, int, int], ...], device: torch.device
) -> Calls:
    """From rectangles (queries first..last-1 of those held, keys begin..end-1 of the stream). The squares are causal and hold every
    query once, in their order."""
    lengths = [last - first for first, last, _, _ in squares]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    own: list[tuple[int, int]] = []
    for _, _, begin, end in squares:
        if own and own[-1][1] == begin:
            own[-1] = own[-1][0], end
        else:
            own.append((begin, end))
    # all bounds in one tensor: each copy to the device would be waited for
    sides = torch.tensor([[[0, b - a], [0, d - c]] for a, b, c, d in whole], dtype=torch.int32).to(device)
    forks = tuple(
        (slice(a, b), slice(c, d), Sequences(side[0], side[1], b - a, d - c, causal=False))
        for (a, b, c, d), side in zip(whole, sides, strict=True)
    )
    longest = max(lengths)
    return Calls(tuple(own), Sequences(bounds, bounds, longest, longest, causal=True), forks)


def attend_by_calls(query: Tensor, key: Tensor, value: Tensor, made: Calls, scale: float, by: Kernel) -> Tensor:
    """Attention [Q, H, D] of the queries that are held to what each sees of the stream."""
    found: Tensor = _Calls.apply(query, key, value, made, scale, by)
    return found


class _Calls(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, made: Calls, scale: float, by: Kernel) -> Tensor:
        out, top = by.forward(query, *(_held(x, made.own) for x in (key, value)), made.squares, scale)
        if made.forks:
            out = out.to(torch.promote_types(out.dtype, torch.float32))
        for part, above, of in made.forks:
            found, height = by.forward(query[part], key[above], value[above], of, scale)
            both = torch.logaddexp(top[:, part], height)
            out[part] *= (top[:, part] - both).exp().T[..., None]
            out[part] += found * (height - both).exp().T[..., None]
            top[:, part] = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, top)
        ctx.made, ctx.scale, ctx.by = made, scale, by
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, top = ctx.saved_tensors
        made, grad = ctx.made, grad.contiguous()
        keys, values = (_held(x, made.own) for x in (key, value))
        parts = ctx.by.backward(grad, query, keys, values, out, top, made.squares, ctx.scale)
        wide = torch.promote_types(query.dtype, torch.float32)  # sums of many parts
        of_query = parts[0].to(wide) if made.forks else parts[0]
        of_key, of_value = (_spread(x, like, made.own, wide) for x, like in zip(parts[1:], (key, value), strict=True))
        del parts
        for part, above, of in made.forks:
            given = query[part], key[above], value[above], out[part], top[:, part].contiguous()
            found = ctx.by.backward(grad[part], *given, of, ctx.scale)
            of_query[part] += found[0]
            of_key[above] += found[1]
            of_value[above] += found[2]
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _held(x: Tensor, own: tuple[tuple[int, int], ...]) -> Tensor:
    """The ranges of x one behind another; a view where there is one."""
    parts = [x[first:last] for first, last in own]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _spread(x: Tensor, like: Tensor, own: tuple[tuple[int, int], ...], kind: torch.dtype) -> Tensor:
    """The way back from `_held`, with zeros elsewhere."""
    if own == ((0, len(like)),):
        return x.to(kind)
    found, at = like.new_zeros(like.shape, dtype=kind), 0
    for first, last in own:
        found[first:last] = x[at : at + last - first]
        at += last - first
    return found
