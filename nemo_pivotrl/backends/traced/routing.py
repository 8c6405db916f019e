"""A mixture's routing without numbers: every expert is sent equally many rows, or `imbalance` times as many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sizes(list[int]):
    """Numbers of rows, where megatron-core asks a tensor for them."""

    def tolist(self) -> list[int]:
        return list(self)

    def ravel(self) -> Sizes:
        return self

    @property
    def T(self) -> Sizes:
        return self


class _Masked(torch.autograd.Function):
    """`masked_select`, of which the number of elements is known. It keeps its input and the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x.new_empty(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x, _) = ctx.saved_tensors
        return torch.zeros_like(x), None, None


class _Sorted(torch.autograd.Function):
    """Chunks in another order: a copy either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """megatron-core's `permute`, with places that hold nothing."""
    assert num_out_tokens is not None and not drop_and_pad
    chosen = routing_map.bool().T.contiguous()
    places = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(0).expand(routing_map.shape[1], -1)
    at = places.new_empty(num_out_tokens)
    weights = None if probs is None else _Masked.apply(probs.T.contiguous(), chosen, num_out_tokens)
    return tokens.index_select(0, at), weights, at


def install(imbalance: float) -> None:
    """Replace what in megatron-core's dispatcher reads numbers."""
    import megatron.core.transformer.moe.moe_utils as utils
    import megatron.core.transformer.moe.token_dispatcher as dispatchers

    def preprocess(self: Any, routing_map: Tensor) -> Sizes:
        """megatron-core's, with sizes instead of what the GPU would have counted."""
        rows = routing_map.shape[0] * self.config.moe_router_topk
        self.num_out_tokens = rows
        counted = routing_map.sum(dim=0).long()
        if self.ep_size > 1 or self.tp_size > 1:
            dispatchers.gather_from_sequence_parallel_region(counted, group=self.tp_ep_group)
        self.input_splits = _even(rows, self.ep_size)
        received = int(rows // self.ep_size * imbalance)
        self.output_splits = Sizes([received] * self.ep_size)
        at_hand = received * self.ep_size
        self.output_splits_tp = Sizes([at_hand] * self.tp_size)
        each = _even(at_hand * self.tp_size, self.num_local_experts)
        self.num_global_tokens_per_local_expert = each
        return each

    def sort_chunks(
        x: Tensor, sizes: Any, order: Any, probs: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return _Sorted.apply(x), None if probs is None else _Sorted.apply(probs)

    for module in (utils, dispatchers):
        module.permute, module.sort_chunks_by_idxs = permute, sort_chunks
    dispatcher: Any = dispatchers.MoEAlltoAllTokenDispatcher
    dispatcher.preprocess = preprocess
    dispatcher._maybe_dtoh_and_synchronize = lambda self, point, sizes=None: sizes


def _even(number: int, parts: int) -> Sizes:
    return Sizes([number // parts] * (parts - 1) + [number - number // parts * (parts - 1)])
