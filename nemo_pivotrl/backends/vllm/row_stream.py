"""A doctor beside an engine that batches continuously: rows come, go and wait as they like, and each keeps its own cache.

Keys and values stand in one table, a slot for each row, filled from the left. A row's new tokens, be it a prompt, the latest
token or several that have waited, are read in one forward pass with all rows that have as many; nothing is read twice, so the
cost grows with the number of tokens. Which slots and which neighbours a row has changes rounding only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from nemo_pivotrl.backends.vllm.shared_base import SharedBase
from nemo_pivotrl.core.errors import InputError, Problem

PREFILL_TOKENS = 8192
"""Padded tokens of one forward pass over prompts."""
FIRST_ROWS, FIRST_TOKENS = 8, 64
"""Size of a table that is made; it doubles when it is full."""


class Table(Cache):
    """Keys and values [slots + 1, heads, tokens, head_dim] of every layer. The last slot takes what padding leaves."""

    def __init__(self) -> None:
        self.layers = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.rows, self.tokens = FIRST_ROWS, FIRST_TOKENS
        self.where: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        """Slot and place [n, S] of each new token in the pass that runs."""
        self.slots: slice | Tensor = slice(0)
        self.used = 0

    def begin(self, slots: Sequence[int], starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Make ready for a pass over `width` left-padded new tokens of the rows at `slots`, which have `starts` before them.

        Positions [n, width], and which keys each may see [n, 1, width, used].
        """
        device = starts.device
        place = starts[:, None] + torch.arange(width, device=device) - (width - lengths)[:, None]
        real = torch.arange(width, device=device) >= (width - lengths)[:, None]
        self.used = int((starts + lengths).max())
        self._grow(self.rows, self.used)
        index = torch.tensor(list(slots), device=device)
        dump = torch.full_like(place, self.rows)
        self.where = (torch.where(real, index[:, None], dump), torch.where(real, place, torch.zeros_like(place)))
        # side by side they need no copy; the usual case, since slots are kept dense
        dense = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self.slots = slice(slots[0], slots[0] + len(slots)) if dense else index
        place = place.clamp(min=0)
        return place, (torch.arange(self.used, device=device) <= place[:, :, None])[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values [n, heads, S, head_dim] away; all that the rows have."""
        found = []
        for table, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in table:
                shape = (self.rows + 1, new.shape[1], self.tokens, new.shape[3])
                table[layer_idx] = new.new_zeros(shape)  # zeros: what is masked must still be finite
            slot, place = self.where
            table[layer_idx][slot, :, place] = new.transpose(1, 2)
            found.append(table[layer_idx][self.slots, :, : self.used])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of `source`."""
        for table in (self.keys, self.values):
            for layer in table.values():
                layer[target, :, :length] = layer[source, :, :length]

    def _grow(self, rows: int, tokens: int) -> None:
        """Grow the cache to hold so many rows and tokens."""
        new_rows, new_tokens = self.rows, self.tokens
        while new_rows < rows:
            new_rows *= 2
        while new_tokens < tokens:
            new_tokens *= 2
        if (new_rows, new_tokens) == (self.rows, self.tokens):
            return
        for table in (self.keys, self.values):
            for number, old in table.items():
                wide = old.new_zeros(new_rows + 1, old.shape[1], new_tokens, old.shape[3])
                wide[: self.rows, :, : self.tokens] = old[:-1]
                table[number] = wide
        self.rows, self.tokens = new_rows, new_tokens


class RowStream:
    """One model reading rows that are known by any key, each with one of its adapters or with none. It reads when logits are asked
    for, and then only these rows."""

    def __init__(self, model: Any, shared: SharedBase | None = None):
        self.model, self.table, self.shared = model, Table(), shared
        self.slot: dict[Hashable, int] = {}
        self.waiting: dict[Hashable, list[int]] = {}
        self.adapter: dict[Hashable, str] = {}
        self.prompt: dict[Hashable, tuple[str, tuple[int, ...]]] = {}
        """With the row's adapter: keys and values of another one are others."""
        self.lengths: list[int] = []
        """Tokens that each slot has read."""
        self.last: Tensor | None = None
        """[slots, V] next-token logits after them."""
        self.tokens_read = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self.slot

    def add(self, key: Hashable, tokens: Sequence[int], adapter: str = "") -> None:
        """A new row. What a row with the same prompt and adapter has read is copied, all but the last token."""
        slot = len(self.lengths)
        self.table._grow(slot + 1, 0)
        self.slot[key], self.prompt[key], self.adapter[key] = slot, (adapter, tuple(tokens)), adapter
        self.lengths.append(0)
        self.waiting[key] = list(tokens)

    def extend(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Add tokens to a row; they are read when its logits are asked for."""
        self.waiting[key] += tokens

    def drop(self, key: Hashable) -> None:
        """Forget a row; the last slot moves into its place."""
        free, end = self.slot.pop(key), len(self.lengths) - 1
        del self.waiting[key], self.prompt[key], self.adapter[key]
        if free != end:
            (mover,) = (k for k, s in self.slot.items() if s == end)
            self.table.copy(end, free, self.lengths[end])
            self.lengths[free] = self.lengths[end]
            self.slot[mover] = free
            if self.last is not None and end < len(self.last):
                self.last[free] = self.last[end]
        self.lengths.pop()

    @torch.no_grad()
    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        """Next-token logits [n, V] of these rows, after everything they were given."""
        for batch in self._unread(keys):
            self._read(batch)
        assert self.last is not None, "a row without tokens"
        return self.last[[self.slot[key] for key in keys]]

    def _unread(self, keys: Sequence[Hashable]) -> Iterator[list[Hashable]]:
        """Rows that have something to read, in passes: one-token rows together, others by length; twins after their twin."""
        single = [key for key in keys if len(self.waiting[key]) == 1 and self.lengths[self.slot[key]]]
        if single:
            yield sorted(single, key=lambda key: self.slot[key])
        longer = sorted((key for key in keys if self.waiting[key]), key=lambda key: len(self.waiting[key]))
        seen = {
            self.prompt[key]: key for key, slot in self.slot.items() if self.lengths[slot] >= len(self.prompt[key][1])
        }
        first, twins = [], []
        for key in longer:
            fresh = not self.lengths[self.slot[key]]
            (twins if fresh and self.prompt[key] in seen else first).append(key)
            if fresh:
                seen.setdefault(self.prompt[key], key)
        yield from self._cut(first)
        for key in twins:
            self._copy_twin(seen[self.prompt[key]], key)
        yield from self._cut([key for key in twins if self.waiting[key]])

    def _cut(self, keys: Sequence[Hashable]) -> Iterator[list[Hashable]]:
        held: list[Hashable] = []
        for key in keys:
            if held and (len(held) + 1) * len(self.waiting[key]) > PREFILL_TOKENS:
                yield held
                held = []
            held.append(key)
        if held:
            yield held

    def _copy_twin(self, source: Hashable, target: Hashable) -> None:
        """A prompt that another row has read: all but its last token, whose logits have to be computed."""
        length = len(self.prompt[target][1]) - 1
        self.table.copy(self.slot[source], self.slot[target], length)
        self.lengths[self.slot[target]] = length
        self.waiting[target] = self.waiting[target][length:]

    def _read(self, keys: Sequence[Hashable]) -> None:
        device = self.model.device
        slots, pieces = [self.slot[key] for key in keys], [self.waiting[key] for key in keys]
        lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        starts = torch.tensor([self.lengths[slot] for slot in slots], device=device)
        width = int(lengths.max())
        ids = torch.tensor([[0] * (width - len(piece)) + piece for piece in pieces], device=device)
        positions, mask = self.table.begin(slots, starts, lengths, width)
        if self.shared is not None:
            self.shared.rows([self.adapter[key] for key in keys])
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.table,
            use_cache=True,
            logits_to_keep=1,
        )
        found = output.logits[:, -1]
        if self.last is None or len(self.last) < self.table.rows:
            wider = found.new_zeros(self.table.rows, found.shape[1])
            if self.last is not None:
                wider[: len(self.last)] = self.last
            self.last = wider
        self.last[slots] = found
        self.tokens_read += int(lengths.sum())
        for key, slot, piece in zip(keys, slots, pieces, strict=True):
            self.lengths[slot] += len(piece)
            self.waiting[key] = []


def check_streams(name: str, model: Any) -> None:
    """Raises InputError for a model whose layers keep anything but all keys and values (sliding windows, Mamba)."""
    config = model.config.get_text_config()
    given = config.to_dict()
    kinds = {*(given.get("layer_types") or []), *(given.get("layers_block_type") or [])}
    other = sorted(kinds - {"full_attention", "mlp", "moe"})
    ids = torch.arange(6, device=model.device)[None] % config.vocab_size
    try:
        stream = RowStream(model)
        stream.add(0, ids[0, :4].tolist())
        stream.logits([0])
        stream.extend(0, ids[0, 4:].tolist())
        with torch.no_grad():
            apart = float((stream.logits([0])[0] - model(input_ids=ids).logits[0, -1]).abs().max())
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        other, apart = [*other, str(error)[:200]], 0.0
    close = 1e-3 if model.dtype == torch.float32 else 0.5
    if other or not apart <= close:
        found = ", ".join(other) or f"logits {apart:.2g} away from its own"
        remedy = "a doctor inside vLLM has full attention in every layer; the reference backend takes this one"
        raise InputError(Problem(f"doctor {name}", None, "layers", found, remedy))
