"""Plain-torch twins of layers that megatron-core has only with Transformer Engine. They run on any device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn


class Norm:
    """Any norm of a layer spec. megatron-core's own torch norm refuses sequence parallelism; this one marks its weight as
    having seen a part of the sequence only, so that `finalize_model_grads` sums its gradient."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        make: Any = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        made: nn.Module = make(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


class DuplicatedLinear(nn.Linear):
    """Transformer Engine's linear layer in its `duplicated` mode: the same weight on every tensor-parallel rank."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """[..., input_size] to ([..., output_size], no bias left to add)."""
        return super().forward(hidden), None


class AllGatherAttention(DotProductAttention):
    """Causal attention with context parallelism: every rank gathers all keys and values and answers its own queries.

    Megatron deals a sequence out in a zigzag: with C ranks it is cut into 2C pieces, and rank r holds the r-th and the
    (2C-1-r)-th, so that all have the same work under a causal mask.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the parent asserts it
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query, key, value [S/C, B, heads, head_dim] to [S/C, B, heads * head_dim]."""
        assert attention_mask is None, "the mask is causal and made here"
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key = gather_from_sequence_parallel_region(key, group=self.cp_group)
        value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        of_keys = torch.cat([zigzag_positions(r, size, key.shape[0]) for r in range(size)]).to(key.device)
        of_queries = zigzag_positions(rank, size, key.shape[0]).to(key.device)
        mask = (of_keys[None, :] > of_queries[:, None])[None, None]
        return super().forward(query, key, value, mask, *args, **kwargs)


def zigzag_positions(rank: int, size: int, length: int) -> Tensor:
    """Positions [length / size] in a sequence of the tokens that context-parallel rank `rank` of `size` holds."""
    piece = length // (2 * size)
    pieces = torch.arange(length).reshape(2 * size, piece)
    return pieces[[rank, 2 * size - 1 - rank]].reshape(-1)
