"""Which rows run together, and how rows that run together are decoded.

`batches` cuts rows that are padded to the widest into batches within a token budget. `Decoder` is one model with its KV cache,
reading the rows of a running batch token by token. Rows that share prefixes are cut by `prefix_tree.packs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


def batches(
    sizes: Sequence[int],
    budget: int,
    order: Iterable[int] | None = None,
    rows: Sequence[int] | int = 1,
    equal: bool = False,
) -> Iterator[list[int]]:
    """Indices of `sizes` in batches whose padded size, rows times the widest, stays within `budget`; a wider one is alone.

    sizes: tokens of a row. order: in which they are taken, by default shortest first. rows: of each index, for those that stand
    for several rows of that size. equal: only rows of one size run together.
    """
    held: list[int] = []
    count = widest = 0
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)) if order is None else order:
        own = rows if isinstance(rows, int) else rows[i]
        if held and ((count + own) * max(widest, sizes[i]) > budget or (equal and sizes[i] != widest)):
            yield held
            held, count, widest = [], 0, 0
        held.append(i)
        count, widest = count + own, max(widest, sizes[i])
    if held:
        yield held


def pad(rows: Sequence[Sequence[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] padded with 0, and their mask."""
    width = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Place [B, L] of each token in its own sequence; 0 on padding to its left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows of a transformers cache, in this order. Its Mamba layers know the verb under another name alone."""
    for layer in cache.layers:
        getattr(layer, "batch_select_indices", layer.reorder_cache)(rows)


class Decoder:
    """One transformers model reading the R rows of a running batch. It runs when logits are asked for, on all that it has not
    read. Each different prompt runs once; prompts are padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]):
        self.model, self.prompts = model, list(prompts)
        self.cache: DynamicCache | None = None
        self.pending: list[Tensor] = []
        self.last: Tensor | None = None
        self.mask = torch.empty(0)

    def feed(self, tokens: Tensor) -> None:
        """The next token [R] of every row."""
        self.pending.append(tokens)

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`, in its order; a row may stand there more than once."""
        self.prompts = [self.prompts[i] for i in index.tolist()]
        self.pending = [tokens[index] for tokens in self.pending]
        if self.cache is not None:
            select_rows(self.cache, index)
            self.mask = self.mask[index]
            self.last = None if self.last is None else self.last[index]

    def logits(self) -> Tensor:
        """Next-token logits [R, V] after everything fed so far."""
        if self.cache is None:
            self._prefill()
        if self.pending:
            tokens = torch.stack(self.pending, 1)
            self.pending = []
            self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], 1)
            self.last = self._forward(tokens, self.mask, tokens.shape[1])
        assert self.last is not None
        return self.last

    def _prefill(self) -> None:
        """Run each different prompt once and hand it to its rows."""
        from transformers import DynamicCache

        place = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, self.prompts)))}
        ids, mask = pad(list(place), left=True, device=self.model.device)
        self.cache = DynamicCache(config=self.model.config)  # it says which layers are Mamba
        logits = self._forward(ids, mask, ids.shape[1])
        rows = torch.tensor([place[tuple(p)] for p in self.prompts], device=self.model.device)
        select_rows(self.cache, rows)
        self.mask, self.last = mask[rows], logits[rows]

    def _forward(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        from nemo_pivotrl.backends.decode_attention import grouped

        with torch.no_grad(), grouped(self.model):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask)[:, -new:],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]
