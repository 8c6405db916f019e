"""The doctor: a causal language model with a head for log V, trained on pairs of answers to one prompt.

The head reads the last hidden state at the L+1 states of an answer, the first of which is the prompt's last token: with shared
prefixes both answers of a pair read that position's one forward pass, hence log V(s_0) is one number. It starts at zero, is kept in
float32, and is dropped on export, so that a doctor is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.prefix_tree import lay_out, packs
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.reference.policy import ReferencePolicy, _fit
from nemo_pivotrl.backends.reference.tree import log_probs, run
from nemo_pivotrl.backends.sampling import pad, positions
from nemo_pivotrl.config import Optimizer, Policy

PairLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(log_probs [N, T], log_values [N, T+1], reference log_probs or None, token ids [N, T], rows' data) -> (loss, metrics)."""


class DoctorModel(ReferencePolicy):
    """Trains on pairs: rows 2p and 2p+1 of a batch are the chosen and the rejected answer to prompt p."""

    section = "doctor"

    def __init__(self, doctor: Policy, anchored: bool = False):
        super().__init__(doctor, with_reference=anchored)
        self.anchored = anchored
        size = self.model.config.get_text_config().hidden_size
        dtype = torch.float64 if doctor.dtype == "float64" else torch.float32
        self.head = torch.nn.Linear(size, 1, device=self.device, dtype=dtype)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def flow(
        self, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """log pi [N, T] of every answer token and log V [N, T+1] of every state (nats); 0 on padding.

        What answers and prompts share runs once, with `prefix_sharing: off` every answer with its whole prompt.
        """
        of_rows = [prompts[p] for p in prompt_of]
        if self.settings.prefix_sharing:
            forest = lay_out(range(len(responses)), of_rows, responses, keep_last=True).to(self.device)
            output, of = run(self.model, forest, output_hidden_states=True)
            values = self._values(output.hidden_states[-1][0, forest.seen])[forest.states]
            return log_probs(output.logits[0], of, forest), values.masked_fill(~_states(forest.mask), 0.0)
        targets, target_mask = pad(responses, left=False, device=self.device)
        ids, mask = pad(of_rows, left=True, device=self.device)
        ids, mask = torch.cat([ids, targets], 1), torch.cat([mask, target_mask], 1)
        size = targets.shape[1] + 1
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=size,
            output_hidden_states=True,
        )
        logits = output.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
        values = self._values(output.hidden_states[-1][:, -size:])
        real = target_mask.bool()
        return chosen.masked_fill(~real, 0.0), values.masked_fill(~_states(real), 0.0)

    def _values(self, hidden: Tensor) -> Tensor:
        """log V of hidden states [..., H]."""
        return self.head(hidden.to(self.head.weight.dtype))[..., 0]

    def _pair_batches(self, batch: TokenBatch) -> list[list[int]]:
        """Row numbers of each micro-batch, whole pairs, within the recipe's tokens: what shares most together, or without
        sharing by length."""
        pairs, budget = [(2 * p, 2 * p + 1) for p in range(len(batch.prompts))], self.settings.train_micro_batch_tokens
        if self.settings.prefix_sharing:
            return packs(batch.prompts_of_rows, batch.responses, budget, groups=pairs, keep_last=True)[0]
        sizes = [len(batch.prompts[p]) + max(len(batch.responses[n]) for n in pair) for p, pair in enumerate(pairs)]
        held: list[list[int]] = []
        for p in sorted(range(len(pairs)), key=lambda p: (sizes[p], p)):  # the last is the longest so far
            if not held or (len(held[-1]) + 2) * sizes[p] > budget:
                held.append([])
            held[-1] += pairs[p]
        return held

    def get_pair_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: PairLoss, forward_only: bool = False
    ) -> dict[str, float]:
        """Run the pairs in micro-batches, accumulate gradients, and return the summed metrics."""
        totals: dict[str, float] = {}
        plan = self._pair_batches(batch)
        for rows in plan:
            used = [batch.prompt_of[n] for n in rows[::2]]
            prompts, responses = [batch.prompts[p] for p in used], [batch.responses[n] for n in rows]
            prompt_of = [i // 2 for i in range(len(rows))]
            reference = self._reference_log_probs(prompts, prompt_of, responses) if self.anchored else None
            with torch.set_grad_enabled(not forward_only):
                found, log_values = self.flow(prompts, prompt_of, responses)
                data = {key: _fit(value[rows], found.shape[1]).to(self.device) for key, value in batch.data.items()}
                token_ids, _ = pad(responses, left=False, device=self.device)
                loss, metrics = loss_fn(found, log_values, reference, token_ids, data)
            if not forward_only:
                loss.backward()
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + float(value)
        return totals | {"token_ratio": self._token_ratio(batch, plan, keep_last=True)}

    @torch.no_grad()
    def _reference_log_probs(
        self, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> Tensor:
        """log pi [N, T] of the doctor as it was before training."""
        if self.reference is not None:
            return self._log_probs(self.reference, prompts, prompt_of, responses)
        with self.model.disable_adapter():
            return self._log_probs(self.model, prompts, prompt_of, responses)

    def prepare_for_training(self, optimizer: Optimizer) -> None:
        """As a policy's, with the head's parameters beside the model's."""
        super().prepare_for_training(optimizer)
        assert self.optimizer is not None
        self.optimizer.add_param_group({"params": list(self.head.parameters())})

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [*super()._trainable(), *self.head.parameters()]

    def _state(self) -> dict[str, Any]:
        """A policy's state and the head."""
        return super()._state() | {"head": {k: v.detach().cpu() for k, v in self.head.state_dict().items()}}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.head.load_state_dict(state["head"])


def _states(tokens: Tensor) -> Tensor:
    """[N, T+1] bool: the states of answers whose tokens are [N, T]."""
    return torch.cat([torch.ones_like(tokens[:, :1]), tokens], 1)
