"""What a loss is given: every backend fills it, both papers' losses read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ModelOutputs(NamedTuple):
    """What a model says of the N responses of a micro-batch, padded to T tokens. Logs in nats, 0 on padding."""

    log_probs: Tensor
    """[N, T] log-probability of each response token."""
    values: Tensor | None = None
    """[N, T+1] log V of every state, the prompt's end first. None: the model has no value head."""
    reference: Tensor | None = None
    """[N, T] `log_probs` of the model as it was before training, without a gradient. None: nobody asked for it."""


def wide(x: Tensor) -> Tensor:
    """At least fp32: differences of log-probabilities are lost in half precision."""
    return x if x.dtype == torch.float64 else x.float()
