"""Rollouts from the weights in training: a plain decode loop over whatever ranks hold the model.

Every rank is given the same prompts and seeds. Data-parallel ranks, and context-parallel ones with them, share the prompts
out; each of them decodes its share with its tensor-parallel ranks and its pipeline's stages, and all samples come back
on every rank. With experts spread over ranks, all ranks take the same number of steps, for an all-to-all waits for everyone.

While turns are decoded, each attention layer's kernel is replaced by one that remembers keys and values (torch's own
attention), Mamba layers keep their state in megatron-core's static context, and sequence parallelism is off: one token
cannot be cut. Nothing of it is left behind in the model.

Prompts stand left-padded with their own positions, so that all of a batch end at one place. Mamba would take padding for
text: a hybrid decodes prompts of one length together, and so does every model above `MASKED_TOKENS`, where the mask of a
padded batch would outweigh its cache. One batch passes through a pipeline at a time; the other stages wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nemo_pivotrl.backends.batching import pad, positions
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.sampling import Row, Turns, shares
from nemo_pivotrl.config import Generation
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample

MASKED_TOKENS = 4096
"""Length of a prompt up to which prompts of unequal lengths decode together."""
OFF = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings", "apply_rope_fusion")
"""Switches of megatron-core's and Transformer Engine's modules that are off in decoding: those that sequence parallelism sets,
and the fused rotary embedding, whose kernel knows one position for all rows."""


@torch.no_grad()
def sample(
    stage: Any,
    groups: Groups,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    generation: Generation,
    row_multiple: int,
    tick: Callable[[str], None],
) -> list[list[Sample | FailedSample]]:
    """One sample for every seed of every prompt, on every rank; see `backends.base.Sampler.infer`. One whose logits were NaN
    is drawn again alone, then it is `FailedSample`.

    stage: a `stage.Stage`. row_multiple: what the rows of a forward pass must be a multiple of (FP8). tick: called with
    every step.
    """
    memory = Memory(stage.module, groups)
    if memory.mixers and groups.cp.size() > 1:
        remedy = "Mamba layers keep their state on one rank while they decode: use 1 for hybrid models"
        found = str(groups.cp.size())
        raise InputError(Problem("recipe", None, "megatron.context_parallel_size", found, remedy))
    equal = bool(memory.mixers) or max((len(p) for p in prompts), default=0) > MASKED_TOKENS
    plan = shares(prompts, seeds, generation, groups.dp_cp.size(), equal)
    mine, together = plan[groups.dp_cp.rank()], groups.ep.size() > 1
    found_here: dict[Row, Sample | FailedSample] = {}

    def draw(rows: Sequence[Row]) -> None:
        # where the others still decode, a rank without rows takes their steps with a row that nobody asked for
        standing = [*rows, *[rows[-1] if rows else None] * (-len(rows) % row_multiple if rows else row_multiple)]
        batch = Batch(
            [prompts[row[0]] if row else [0] for row in standing],
            [seeds[row[0]][row[1]] if row else 0 for row in standing],
        )
        turns = Turns(batch.seeds, stop_ids, generation)
        _decode(stage, groups, memory, batch, turns, together, row_multiple > 1, tick)
        found_here.update(zip(rows, turns.samples(), strict=False))

    with memory.in_place():
        for number in range(max(map(len, plan)) if together else len(mine)):
            draw(mine[number] if number < len(mine) else [])
        # logits that are no numbers: once more, alone, as what stood beside a row may have spoilt it
        lost = [row for row, found in found_here.items() if isinstance(found, FailedSample)]
        for number in range(_most(len(lost), groups) if together else len(lost)):
            draw(lost[number : number + 1])
    everything: list[Any] = [found_here]
    if groups.dp_cp.size() > 1:
        everything = [None] * groups.dp_cp.size()
        dist.all_gather_object(everything, found_here, group=groups.dp_cp)
    of_row = {row: found for part in everything for row, found in part.items()}
    return [[of_row[p, k] for k in range(len(own))] for p, own in enumerate(seeds)]


class Batch:
    """Rows that decode together. Equal prompts run once."""

    def __init__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]):
        self.seeds = seeds
        place: dict[tuple[int, ...], int] = {}
        self.prompt_of = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
        self.prompts = list(place)


def _decode(
    stage: Any,
    groups: Groups,
    memory: Memory,
    batch: Batch,
    turns: Turns,
    together: bool,
    whole: bool,
    tick: Callable[[str], None],
) -> None:
    """Draw the turns. `together`: until all ranks are done; `whole`: no row leaves before the last has finished."""
    tick("infer: prompts")
    prompts = batch.prompts
    if whole:  # rows must keep their multiple from the first pass on
        prompts, batch.prompt_of = [batch.prompts[p] for p in batch.prompt_of], list(range(len(batch.prompt_of)))
    tokens, mask = pad(prompts, left=True, device=groups.device)
    memory.begin(mask, tokens.shape[1] + turns.generation.max_new_tokens)
    logits = _forward(stage, groups, memory, tokens)
    rows = torch.tensor(batch.prompt_of, device=groups.device)
    memory.keep(rows)
    logits = None if logits is None else logits[rows]
    while True:
        drawn = torch.empty(2, len(turns.alive), dtype=torch.float64, device=groups.device)
        if logits is not None:
            drawn = torch.stack([found.double() for found in turns.draw(logits)])
        _from_last_stage(drawn, groups)
        token = drawn[0].long()
        turns.note(token.tolist(), drawn[1].tolist())
        if _all_done(turns, groups) if together else turns.done:
            return
        staying = None if whole else turns.leave()
        if staying is not None:
            index = torch.tensor(staying, device=groups.device)
            memory.keep(index)
            token = token[index]
        tick(f"infer: token {turns.step}")
        logits = _forward(stage, groups, memory, token[:, None])


def _forward(stage: Any, groups: Groups, memory: Memory, tokens: Tensor) -> Tensor | None:
    """Next-token logits [B, V] after tokens [B, S], on the last stage; the other stages hand their hidden states on."""
    chunk, (batch, length) = stage.module, tokens.shape
    own = memory.advance(length)  # positions [B, S]
    rank = groups.pp.rank()
    hidden = None
    if groups.first_stage:
        hidden = chunk.embedding(input_ids=tokens, position_ids=own)
    else:
        received = torch.empty(
            length, batch, chunk.config.hidden_size, dtype=chunk.config.params_dtype, device=groups.device
        )
        dist.recv(received, dist.get_global_rank(groups.pp, rank - 1), group=groups.pp)
        chunk.set_input_tensor(received)
    hidden = chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=memory.rotary(own))
    if not groups.last_stage:
        dist.send(hidden.contiguous(), dist.get_global_rank(groups.pp, rank + 1), group=groups.pp)
        return None
    logits = hidden[-1] @ stage.lm_head().t()
    if groups.tp.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(groups.tp.size())]
        dist.all_gather(parts, logits.contiguous(), group=groups.tp)
        logits = torch.cat(parts, 1)
    return logits[:, : stage.vocab_size]


def _from_last_stage(drawn: Tensor, groups: Groups) -> None:
    """Make what the last stage's first tensor-parallel rank drew everyone's: equal logits need not make equal draws on a
    GPU, whose sums depend on their order."""
    if groups.last_stage and groups.tp.size() > 1:
        dist.broadcast(drawn, dist.get_global_rank(groups.tp, 0), group=groups.tp)
    if groups.pp.size() > 1:
        dist.broadcast(drawn, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)


def _most(count: int, groups: Groups) -> int:
    """The largest count of any rank."""
    found = torch.tensor([float(count)], device=groups.device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=groups.world)
    return int(found)


def _all_done(turns: Turns, groups: Groups) -> bool:
    running = torch.tensor([0.0 if turns.done else 1.0], device=groups.device)
    dist.all_reduce(running, dist.ReduceOp.MAX, group=groups.world)
    return not bool(running)


class Memory:
    """What the layers of a model chunk remember of the rows that are being decoded."""

    def __init__(self, chunk: Any, groups: Groups):
        self.chunk, self.groups = chunk, groups
        self.attentions = [m for m in chunk.modules() if isinstance(m, Attention)]
        self.mixers = [m for m in chunk.modules() if "MambaMixer" in (kind.__name__ for kind in type(m).__mro__)]
        self.kernels = [RememberingAttention(self, attention) for attention in self.attentions]
        self.mamba: Any = None
        self.seen = torch.empty(0)
        """[B, most tokens] bool: not padding."""
        self.used = self.most = self.width = 0
        self.visible: Tensor | None = None
        """[B, 1, S, used] bool: what the tokens of this pass may look at; None: all, or all before them in a prompt."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the kernels into the model, and take them out again."""
        modules = list(self.chunk.modules())
        configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
        switches = [(m, name) for m in (*modules, *configs.values()) for name in OFF]
        cut = [(m, name) for m, name in switches if getattr(m, name, False) is True]
        training, held = self.chunk.training, [a.core_attention for a in self.attentions]
        try:
            self.chunk.eval()
            for module, name in cut:
                setattr(module, name, False)
            for attention, kernel in zip(self.attentions, self.kernels, strict=True):
                attention.core_attention = kernel
            for mixer in self.mixers:
                mixer.forward = _with_state(mixer, self)
            yield
        finally:
            for mixer in self.mixers:
                del mixer.forward
            for attention, kernel in zip(self.attentions, held, strict=True):
                attention.core_attention = kernel
            for module, name in cut:
                setattr(module, name, True)
            self.chunk.train(training)
            self.chunk.set_input_tensor(None)
            self.begin(torch.empty(0, 0), 0)

    def begin(self, mask: Tensor, most: int) -> None:
        """Forget everything; the next rows have prompts with this mask [B, P] and at most `most` tokens."""
        self.seen, self.width, self.used, self.most = mask.bool(), mask.shape[1], 0, most
        self.padded = bool((mask == 0).any())
        self.table = None
        self.mamba = StaticInferenceContext(max(1, len(mask)), max(1, most))
        for kernel in self.kernels:
            kernel.keys = kernel.values = None

    def advance(self, length: int) -> Tensor:
        """Make room for `length` more tokens of each row; their positions [B, length]."""
        begin, self.used = self.used, self.used + length
        if begin:
            self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.seen), length)], 1)
        place = positions(self.seen.long())[:, begin:]
        self.visible = None
        if self.padded:
            causal = torch.ones(length, self.used, dtype=torch.bool, device=place.device).tril(begin)
            self.visible = causal[None] & self.seen[:, None]
            if not begin:  # padding looks at itself: looking at nothing would make it NaN
                self.visible = self.visible | torch.eye(length, dtype=torch.bool, device=place.device)
            self.visible = self.visible[:, None]
        self.mamba.sequence_len_offset = self.mamba.seqlen_offset = begin
        return place

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order; one may stand there several times."""
        self.seen = self.seen[rows]
        for kernel in self.kernels:
            kernel.keep(rows)
        for mixer in self.mixers:
            states = self.mamba.key_value_memory_dict
            states[mixer.layer_number] = tuple(state[rows] for state in states[mixer.layer_number])
            mixer.cached_batch_size = len(rows)  # it makes a new state when the batch's size is not what it was

    def rotary(self, place: Tensor) -> Tensor | None:
        """Angles [S, B, 1, D] of positions [B, S]; None for a model without rotary embedding."""
        if getattr(self.chunk, "rotary_pos_emb", None) is None:
            return None
        if self.table is None:
            self.table = self.chunk.rotary_pos_emb.get_emb(self.most)[:, 0]  # [most, 1, D]
        return self.table[place.t()]


class RememberingAttention(nn.Module):
    """Attention of a layer's new tokens over all that its rows have seen."""

    def __init__(self, memory: Memory, attention: Any):
        super().__init__()
        self.book = [memory]  # in a list: it holds the model, which is no part of this module
        self.scale = attention.config.softmax_scale
        self.keys: Tensor | None = None
        """[B, key-value heads, most tokens, head_dim]; of which the first `used` are filled."""
        self.values: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [S, B, heads, head_dim], key and value [S, B, key-value heads, head_dim] to [S, B, heads * head_dim]."""
        memory, length = self.book[0], key.shape[0]
        begin = memory.used - length
        if self.keys is None or self.values is None:  # a prompt: room for the rest is made when its rows are known
            self.keys, self.values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        else:
            self.keys[:, :, begin : memory.used] = key.permute(1, 2, 0, 3)
            self.values[:, :, begin : memory.used] = value.permute(1, 2, 0, 3)
        found = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            self.keys[:, :, : memory.used],
            self.values[:, :, : memory.used],
            attn_mask=memory.visible,
            is_causal=memory.visible is None and begin == 0 and length > 1,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return found.permute(2, 0, 1, 3).flatten(2)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order."""
        assert self.keys is not None and self.values is not None, "nothing has been seen"
        self.keys, self.values = (self._kept(held, rows) for held in (self.keys, self.values))

    def _kept(self, held: Tensor, rows: Tensor) -> Tensor:
        used, most = self.book[0].used, self.book[0].most
        made = held.new_empty(len(rows), held.shape[1], most, held.shape[3])
        made[:, :, :used] = held[rows, :, :used]
        return made


def _with_state(mixer: Any, memory: Memory) -> Callable[..., Any]:
    """A Mamba mixer's forward pass that keeps its state between calls."""

    def forward(hidden: Tensor, inference_context: Any = None, **_: Any) -> Any:
        return type(mixer).forward(mixer, hidden, inference_context=memory.mamba)

    return forward
