"""One pipeline stage as it is trained: Megatron's model, and on the last stage log-probabilities instead of logits.

The LM head runs only where a response token is predicted, which on long prompts is a small part of the sequence, and a
chunk of those positions at a time. What leaves the last stage is one number a position, put together over the
context-parallel ranks, so that a loss sees whole rows whatever the layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nemo_pivotrl.backends.megatron.local_layers import ForestParams
from nemo_pivotrl.backends.megatron.logprobs import chunked_log_probs
from nemo_pivotrl.backends.megatron.microbatches import Rows
from nemo_pivotrl.backends.megatron.parallel import Groups


class PipelineStage(MegatronModule):
    """A GPT or hybrid model chunk and, on a doctor's last stage, the head for log V.

    The chunk stands in `module`, through which Megatron's schedules reach what they ask a model for.
    """

    def __init__(self, chunk: Any, groups: Groups, vocab_size: int, chunk_tokens: int, with_head: bool = False):
        super().__init__(config=chunk.config)
        self.module = chunk
        self.groups, self.vocab_size, self.chunk_tokens = groups, vocab_size, chunk_tokens
        self.temperature = 1.0
        self.prefix_attention = "auto"
        forget_routing(chunk)
        self.head: nn.Linear | None = None
        if with_head and groups.last_stage:
            # float32 whatever the model's precision, and outside FP8: a plain torch module
            self.head = nn.Linear(chunk.config.hidden_size, 1, device=groups.device, dtype=torch.float32)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, rows: Rows) -> Tensor:
        """Hidden states for the next stage; on the last one the log-probability of every prediction [P] and, with a head,
        log V of every state behind them, [P + U].

        Each is the same number on every tensor- and context-parallel rank of the stage; gradients reach what this rank
        itself computed.
        """
        batch, length = rows.tokens.shape
        here = rows.held(self.groups.cp.rank(), self.groups.cp.size()).to(rows.tokens.device)
        hidden = self._hidden(rows.tokens[:, here], rows.positions[:, here], _packed(rows, self.prefix_attention))
        if not self.groups.last_stage:
            return hidden
        if self.config.sequence_parallel:
            # every tensor-parallel rank works on the same gathered tokens, so each has the whole gradient of its part
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        flat = hidden.transpose(0, 1).reshape(batch * len(here), -1)
        mine, at = own_places(rows.places, here, batch, length)
        found = chunked_log_probs(
            flat[at],
            self.lm_head(),
            rows.goals[mine],
            self.groups.tp,
            self.chunk_tokens,
            self.vocab_size,
            self.temperature,
        )
        log_probs = self._whole(found, mine, len(rows.places))
        if self.head is None:
            return log_probs
        mine, at = own_places(rows.seen, here, batch, length)
        values = self.head(flat[at].to(self.head.weight.dtype))[:, 0]
        return torch.cat([log_probs, self._whole(values, mine, len(rows.seen))])

    def _hidden(self, tokens: Tensor, positions: Tensor, packed: PackedSeqParams | None = None) -> Tensor:
        """Hidden states [S / cp (/ tp), B, H] after the stage's layers and, on the last one, the final norm.

        packed: what attention must know of a stream; None where rows are padded.
        """
        chunk, last = self.module, self.module.post_process
        chunk.post_process = False  # the model's own head would make logits of every position
        rotary = chunk.rotary_pos_emb if isinstance(packed, ForestParams) and self.rotates else None
        if rotary is not None:
            # megatron-core turns the i-th token of a stream by i; in a forest its position is another
            rotary.forward = lambda length, **_: rotary.get_emb(length)[positions[0]]
        extra = {} if packed is None else {"packed_seq_params": packed}
        try:
            return chunk(input_ids=tokens, position_ids=positions, attention_mask=None, **extra)
        finally:
            chunk.post_process = last
            if rotary is not None:
                del rotary.forward

    @property
    def rotates(self) -> bool:
        """Attention uses rotary embeddings; that of hybrids uses none."""
        return bool(self.module.position_embedding_type == "rope")

    def lm_head(self) -> Tensor:
        """This rank's shard [V / tp, H]."""
        chunk = self.module
        if chunk.share_embeddings_and_output_weights:
            return chunk.shared_embedding_or_output_weight()
        return chunk.output_layer.weight

    def _whole(self, found: Tensor, place: Tensor, size: int) -> Tensor:
        """Numbers [m] at `place` of [size], with those of the other context-parallel ranks."""
        return _Collect.apply(found.new_zeros(size).index_put((place,), found), self.groups.cp)


def forget_routing(stage: nn.Module) -> None:
    """Let every mixture's dispatcher go of its routing when its layer has run.

    It would keep it until the layer runs again: a map and probabilities of all tokens, and by the probabilities' graph the layer's
    input (with pipeline stages, of a micro-batch more than are under way), all weights, and through their hooks the model and its
    process groups, which Python's collector could then never free.
    """
    for layer in stage.modules():
        dispatcher = getattr(layer, "token_dispatcher", None)
        if dispatcher is None:
            continue
        constant = {name for name, value in vars(dispatcher).items() if isinstance(value, Tensor)}

        def forget(_: Any, __: Any, ___: Any, dispatcher: Any = dispatcher, constant: set[str] = constant) -> None:
            for name, value in vars(dispatcher).items():
                if isinstance(value, Tensor) and name not in constant:
                    setattr(dispatcher, name, None)

        layer.register_forward_hook(forget)


def own_places(places: Tensor, here: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Which of `places` [P] in the flattened [B * S] a context-parallel rank holds [m], and where each of these is among the
    tokens that it holds [m]. here: its places in a row or stream of `length`."""
    place = (torch.arange(batch, device=here.device)[:, None] * length + here).flatten()  # in the whole [B * S]
    local = torch.full((batch * length,), -1, device=here.device)
    local[place] = torch.arange(len(place), device=here.device)
    mine = (local[places] >= 0).nonzero()[:, 0]
    return mine, local[places[mine]]


def _packed(rows: Rows, form: str) -> PackedSeqParams | None:
    """What attention and rotary embeddings must know of a stream; padding counts as a part of its own sequence."""
    if rows.forest is not None:
        longest = int(rows.positions.max()) + 1
        return ForestParams(
            max_seqlen_q=longest, max_seqlen_kv=longest, forest=rows.forest, form=form, ranges=rows.ranges
        )
    if rows.starts is None:
        return None
    longest = int((rows.starts[1:] - rows.starts[:-1]).max())
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    bounds = dict.fromkeys(names, rows.starts)
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, **bounds)


class _Collect(torch.autograd.Function):
    """Sum over a group forward. Backward each rank keeps the gradient of its own part: all of them compute the same
    loss, and the parts' gradients are summed where all gradients are."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole = part.clone()
        if group.size() > 1:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
