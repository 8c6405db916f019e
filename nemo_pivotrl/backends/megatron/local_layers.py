"""Plain-torch twins of layers that megatron-core has only with Transformer Engine. They run on any device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from nemo_pivotrl.algorithms.prefix_tree import Forest
from nemo_pivotrl.backends.megatron.microbatches import context_part
from nemo_pivotrl.backends.tree_attention import Ranges, attend


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


@dataclass
class ForestParams(PackedSeqParams):
    """A stream that shares prefixes. It has no `qkv_format`, so that megatron-core leaves the stream as it is: [S, 1, ...].

    It reaches the layers as an argument, which is what a recomputed layer is given again.
    """

    forest: Forest | None = None
    form: str = "auto"
    """`policy.prefix_attention`."""
    ranges: tuple[Ranges, ...] | None = None
    """The places of each context-parallel rank."""


def over_forest(query: Tensor, key: Tensor, value: Tensor, given: ForestParams, scale: float, group: Any) -> Tensor:
    """query [S/C, 1, heads, head_dim], key and value likewise with fewer heads, to [S/C, 1, heads * head_dim].

    group: the C context-parallel ranks. Each gathers the keys and values of all, which are few, and answers its own queries.
    """
    assert given.forest is not None, "made with one"
    held = None
    if group.size() > 1:
        key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        assert given.ranges is not None, "made with them"
        order = _stream_order(given.ranges, key.device)
        key, value = key[order], value[order]
        held = given.ranges[group.rank()]
    found = attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), given.forest, scale, held, given.form)
    return found.permute(2, 0, 1, 3).flatten(2)


@functools.lru_cache(maxsize=4)
def _stream_order(ranges: tuple[Ranges, ...], device: torch.device) -> Tensor:
    """[S] long: where each place of a stream is among what was gathered, which is in the order in which the ranks hold it. One
    for all layers: making it waits for the device."""
    keys = torch.cat([torch.arange(first, last) for own in ranges for first, last in own])
    return keys.argsort().to(device)


def with_forests(attention: type) -> type:
    """A core attention of megatron-core (Transformer Engine's) that takes streams with shared prefixes, too."""

    class Attention(attention):  # type: ignore[misc]
        def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
            super().__init__(*args, pg_collection=pg_collection, **kwargs)
            self.over = pg_collection.cp

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: PackedSeqParams | None = None,
            **kwargs: Any,
        ) -> Any:
            if isinstance(packed_seq_params, ForestParams):
                return over_forest(query, key, value, packed_seq_params, query.shape[-1] ** -0.5, self.over)
            return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)

    return Attention


def te_with_forests() -> dict[type, type]:
    """Transformer Engine's attention, and what stands in for it so that prefixes can be shared."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return {TEDotProductAttention: with_forests(TEDotProductAttention)}


class StreamAttention(DotProductAttention):
    """Causal attention over packed streams and over context-parallel ranks, which megatron-core's plain one refuses.

    Every rank gathers all keys and values and answers its own queries, over rows with a mask of all pairs: for CPUs and small
    sequences.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the parent asserts it
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query, key, value [S/C, B, heads, head_dim] to [S/C, B, heads * head_dim]; packed, they come without B."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if packed_seq_params is None and size == 1:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        assert attention_mask is None, "the mask is causal and made here"
        if isinstance(packed_seq_params, ForestParams):
            return over_forest(query, key, value, packed_seq_params, self.softmax_scale, self.cp_group)
        if packed_seq_params is not None:
            query, key, value = (x[:, None] for x in (query, key, value))
        if size > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        starts = [0, key.shape[0]] if packed_seq_params is None else packed_seq_params.cu_seqlens_q.tolist()
        mask = stream_mask(starts, rank, size).to(key.device)
        return super().forward(query, key, value, mask[None, None], *args, **kwargs)


def stream_mask(starts: Sequence[int], rank: int, size: int) -> Tensor:
    """[S/C, S] bool, True where a query of context-parallel rank `rank` of `size` must not look: at later tokens, and at
    those of other sequences. Keys are in the order in which the ranks hold them."""
    keys, queries = _held(starts, rank, size)
    queries = queries[:, None]
    bounds = torch.tensor(starts)
    of_keys, of_queries = (torch.searchsorted(bounds, places, right=True) for places in (keys, queries))
    return (keys > queries) | (of_keys != of_queries)


def _held(starts: Sequence[int], rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Places in the stream of all keys, in the order in which the ranks hold them, and of this rank's queries."""
    return torch.cat([context_part(starts, r, size) for r in range(size)]), context_part(starts, rank, size)
