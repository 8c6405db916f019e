"""Log-probabilities of given tokens from Megatron weights: the patient's two faces, where it is too large for one device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.train import MegatronPolicy
from nemo_pivotrl.config import Generation, Megatron, Patient, Policy


class MegatronScorer(MegatronPolicy):
    """A frozen causal language model that scores given tokens. See `backends.base.Scorer`; `patient.dtype` and `device` are
    the `megatron` section's business here."""

    def __init__(self, patient: Patient, megatron: Megatron, groups: Groups):
        # temperature 1: the importance of a token is a difference of the model's own log-probabilities
        policy = Policy(
            model_name=patient.model_name,
            backend="megatron",
            train_micro_batch_tokens=patient.batch_tokens,
            prefix_sharing=patient.prefix_sharing,
            generation=Generation(temperature=1.0),
        )
        super().__init__(policy, megatron, groups)

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """Log-probability [T] (nats, on the CPU) of each response token, sequence by sequence, on every rank."""
        if any(not prompt or not response for prompt, response in sequences):
            raise ValueError("a sequence needs at least one prompt token and one response token")
        batch = TokenBatch([p for p, _ in sequences], range(len(sequences)), [r for _, r in sequences], {})
        whole = self.get_inference_log_probs(batch)
        return [row[: len(response)] for row, (_, response) in zip(whole, sequences, strict=True)]
