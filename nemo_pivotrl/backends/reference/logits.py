"""Log-probabilities from hidden states, a chunk of positions at a time: a pass costs its hidden states and one chunk of logits, never
all positions times the vocabulary. With gradients a chunk's logits are computed once more in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

CHUNK_LOGITS = 1 << 25
"""Logits that exist at one time: 128 MiB in float32, and a few times that on the way."""


def chunked_log_probs(model: Any, hidden: Tensor, of: Tensor, goals: Tensor, temperature: float) -> Tensor:
    """[P] log-probability (nats, float32 or better) of the tokens `goals`, each under the logits of the row `of` it in hidden [A, H].

    `of` must not decrease. model: one that `takes_hidden`.
    """
    size = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)

    def part(rows: Tensor, wanted: Tensor, at: Tensor) -> Tensor:
        logits = logits_of(model, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits[at, wanted] - logits.logsumexp(1)[at]

    again = torch.is_grad_enabled() and len(hidden) > size
    found = []
    for start in range(0, len(hidden), size):
        mine = (of >= start) & (of < start + size)
        given = hidden[start : start + size], goals[mine], of[mine] - start
        found.append(checkpoint(part, *given, use_reentrant=False) if again else part(*given))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits [n, V] of last hidden states [n, H], with whatever the model does behind its head (scale, soft cap): the model runs
    with its decoder replaced by one that has already answered."""
    name = model.base_model_prefix
    decoder = model.get_submodule(name)
    setattr(model, name, _Answered(hidden[None]))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        return model(input_ids=token, use_cache=False).logits[0]
    finally:
        setattr(model, name, decoder)


@torch.inference_mode()
def takes_hidden(model: Any) -> bool:
    """Whether the model's logits follow from its last hidden state as `logits_of` takes them; it is asked before it gets adapters."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(4, device=model.device) % rows)[None]
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
        found = logits_of(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    except (AttributeError, TypeError):
        return False
    close = 5e-2 if model.dtype is torch.bfloat16 else 1e-4
    return whole.shape == found.shape and torch.allclose(whole, found, close, close)


class _Answered(torch.nn.Module):
    """Stands in for a decoder, also one of experts: gives the hidden states it was made with, whatever it is asked."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)
