"""The reference scorer: log-probabilities of given tokens through transformers on one device.

A face's prompt stands before both answers, and runs once (`prefix_tree.py`). With `prefix_sharing: off` sequences are padded on
the right: under a causal model no token sees what stands behind it, so padding cannot change a number. Logits exist only
for response tokens, a chunk at a time, in float32 or better: a batch costs its hidden states and one chunk, never [B, T, V].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from nemo_pivotrl.algorithms.prefix_tree import lay_out, packs
from nemo_pivotrl.backends.hf_models import load_model
from nemo_pivotrl.backends.reference.tree import over_forests, prepare
from nemo_pivotrl.backends.sampling import batches_within
from nemo_pivotrl.config import Patient
from nemo_pivotrl.core.errors import InputError, Problem

transformers.utils.logging.disable_progress_bar()  # loading takes seconds; the stages have bars of their own

CHUNK_LOGITS = 1 << 25
"""Logits that exist at one time: 128 MiB in float32, and a few times that on the way."""

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


class ReferenceScorer:
    """A frozen causal language model that scores given tokens. See `backends.base.Scorer`."""

    def __init__(self, patient: Patient):
        self.settings = patient
        device = patient.device if patient.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        dtype = getattr(torch, patient.dtype)
        self.model = load_model(patient.model_name, "patient.model_name", dtype, self.device).requires_grad_(False)
        self._check_head()
        if patient.prefix_sharing:
            prepare(self.model, "patient.prefix_sharing")

    @torch.inference_mode()
    def log_probs(self, sequences: Sequences) -> list[Tensor]:
        """Log-probability [T] (nats, float32 or better, on the CPU) of each response token, sequence by sequence.

        Sequences go through the model together while rows times longest stay within `patient.batch_tokens`; how they
        are put together changes rounding only.
        """
        if any(not prompt or not response for prompt, response in sequences):
            raise ValueError("a sequence needs at least one prompt token and one response token")
        out: list[Tensor] = [torch.empty(0)] * len(sequences)
        budget, sharing = self.settings.batch_tokens, self.settings.prefix_sharing
        batches = (
            packs(*_columns(sequences), budget)[0]
            if sharing
            else batches_within([len(p) + len(r) for p, r in sequences], budget)
        )
        for batch in batches:
            part = [sequences[n] for n in batch]
            for n, found in zip(batch, self._over_forest(part) if sharing else self._forward(part), strict=True):
                out[n] = found
        return out

    def _over_forest(self, sequences: Sequences) -> list[Tensor]:
        """What the sequences share runs once; each token is predicted once at each place."""
        forest = lay_out(range(len(sequences)), *_columns(sequences)).to(self.device)
        with over_forests(self.model):
            hidden = self.model.base_model(
                input_ids=forest.tokens[None], position_ids=forest.positions[None], use_cache=False, forest=forest
            ).last_hidden_state[0, forest.places]
        found = torch.cat([self._of_targets(h, t) for h, t in self._chunks(hidden, forest.goals)])
        rows = forest.pick(found).cpu()
        return [row[: len(response)] for row, (_, response) in zip(rows, sequences, strict=True)]

    def _forward(self, sequences: Sequences) -> list[Tensor]:
        width = max(len(p) + len(r) for p, r in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        predicts = torch.zeros(ids.shape, dtype=torch.bool)  # positions whose next token is a response token
        for n, (prompt, response) in enumerate(sequences):
            size = len(prompt) + len(response)
            ids[n, :size] = torch.tensor([*prompt, *response])
            mask[n, :size] = 1
            predicts[n, len(prompt) - 1 : size - 1] = True
        targets = ids.roll(-1, 1)[predicts].to(self.device)
        hidden = self._hidden(ids.to(self.device), mask.to(self.device))[predicts.to(self.device)]  # [all responses, H]
        found = torch.cat([self._of_targets(h, t) for h, t in self._chunks(hidden, targets)]).cpu()
        return list(found.split([len(response) for _, response in sequences]))

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden state [B, L, H], without logits."""
        return self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, CHUNK_LOGITS // self.model.config.get_text_config().vocab_size)
        return zip(hidden.split(size), targets.split(size), strict=True)

    def _of_targets(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H], with whatever the model does behind its head (scale, soft cap): the
        model runs with its decoder replaced by one that has already answered."""
        name = self.model.base_model_prefix
        decoder = self.model.get_submodule(name)
        setattr(self.model, name, _Answered(hidden[None]))
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            return self.model(input_ids=token, use_cache=False).logits[0]
        finally:
            setattr(self.model, name, decoder)

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model whose logits do not follow from its last hidden state as `_logits` takes them."""
        ids = torch.arange(4, device=self.device)[None]
        kind = type(self.model).__name__
        try:
            whole = self.model(input_ids=ids, use_cache=False).logits[0].float()
            found = self._logits(self._hidden(ids, torch.ones_like(ids))[0]).float()
        except (AttributeError, TypeError) as error:
            found = whole = torch.empty(0)
            kind += f" ({error})"
        close = 1e-4 if self.settings.dtype != "bfloat16" else 5e-2
        if whole.numel() == 0 or whole.shape != found.shape or not torch.allclose(whole, found, close, close):
            remedy = "the scorer cannot take this architecture's logits chunk by chunk; use another patient"
            raise InputError(Problem(self.settings.model_name, None, "patient.model_name", kind, remedy))


class _Answered(torch.nn.Module):
    """Stands in for a decoder: gives the hidden states it was made with, whatever it is asked."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def _columns(sequences: Sequences) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Prompts and responses."""
    return [p for p, _ in sequences], [r for _, r in sequences]
