"""The doctor over megatron-core: a policy with a head for log V on its last stage, trained on pairs of answers.

The head reads the final hidden state at the L+1 states of an answer, starts at zero, stays in float32 and is dropped on
export. Under context parallelism log pi and log V of a row's positions are put together over the ranks before the loss,
one float a token, so that SubTB sees whole answers and each rank's gradient is that of its own positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.megatron.microbatches import Rows
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.train import MegatronPolicy, _data_of
from nemo_pivotrl.config import Megatron, Policy

PairLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(log_probs [n, T], log_values [n, T+1], reference log_probs or None, token ids [n, T], rows' data) -> (loss, metrics)."""


class MegatronDoctor(MegatronPolicy):
    """Trains on pairs: rows 2p and 2p+1 of a batch are the chosen and the rejected answer to prompt p."""

    with_head = True

    def __init__(self, doctor: Policy, megatron: Megatron, groups: Groups, anchored: bool = False):
        super().__init__(doctor, megatron, groups, with_reference=anchored)
        self.anchored = anchored
        self.stage.temperature = 1.0  # log pi of the balance is the model's own, however answers are sampled

    def _groups_of_rows(self, batch: TokenBatch) -> list[tuple[int, ...]]:
        return [(row, row + 1) for row in range(0, len(batch.responses), 2)]

    def get_pair_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: PairLoss, forward_only: bool = False
    ) -> dict[str, float]:
        """Run the pairs, accumulate gradients, and return the summed metrics, the same on every rank."""
        if not batch.responses:
            return {}
        reference = self.get_inference_log_probs(batch, reference=True) if self.anchored else None
        width = max(len(r) for r in batch.responses)
        token_ids = torch.stack([pad(torch.tensor(list(r)), (0, width - len(r))) for r in batch.responses])

        def work(rows: Rows, log_probs: Tensor, values: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            assert values is not None, "the last stage has a head"
            at, wide = list(rows.rows), log_probs.shape[1]
            start = None if reference is None else reference[at][:, :wide].to(log_probs.device)
            ids = token_ids[at][:, :wide].to(log_probs.device)
            return loss_fn(log_probs, values, start, ids, _data_of(batch, rows, log_probs))

        return self._totals(self._run(batch, work, forward_only)) | self._token_ratio(batch)
