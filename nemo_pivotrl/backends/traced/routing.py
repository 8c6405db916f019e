"""A mixture's routing without numbers: every expert is sent equally many rows, or `imbalance` times as many.

Rows are moved by Transformer Engine's own permutation, whose shapes follow from numbers of rows that are known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sizes(list[int]):
    """Numbers of rows, where megatron-core asks a tensor for them."""

    def tolist(self) -> list[int]:
        return list(self)


def install(imbalance: float) -> None:
    """Replace what in megatron-core's dispatcher reads numbers."""
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
        if self.num_local_experts > 1:  # it stays on the GPU, where the sorting kernel reads it
            chunks = torch.empty(
                self.tp_size * self.ep_size, self.num_local_experts, dtype=torch.long, device=counted.device
            )
            self.num_global_tokens_per_local_expert = chunks
        return _even(at_hand * self.tp_size, self.num_local_experts)

    dispatcher: Any = dispatchers.MoEAlltoAllTokenDispatcher
    dispatcher.preprocess = preprocess
    dispatcher._maybe_dtoh_and_synchronize = lambda self, point, sizes=None: sizes


def _even(number: int, parts: int) -> Sizes:
    return Sizes([number // parts] * (parts - 1) + [number - number // parts * (parts - 1)])
