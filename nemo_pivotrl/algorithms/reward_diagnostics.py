"""How much signal LLMdoctor's token rewards hold (equation (24), D20). Shapes and units are those of `llmdoctor.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import TokenRewards
from nemo_pivotrl.algorithms.model_outputs import wide


class RewardDiagnostics(NamedTuple):
    """How much signal stage 1 found, answer by answer, each [N]; kept share = sum of `kept` / sum of `tokens`."""

    tokens: Tensor
    kept: Tensor
    """Tokens with a non-zero reward. Theta 0.1 keeps most tokens (> 90 % of exponential importances), 0.9 keeps 23 %."""
    importance: Tensor
    """Mean Delta (nats a token)."""
    agreement: Tensor
    """Share of the summed Delta from tokens which the face that the label calls for prefers; 0.5 is chance, 0 if none."""
    noise: Tensor | None
    """Mean difference (nats a token) of one face scored twice: `importance` near it is noise that S would amplify."""


def reward_diagnostics(
    found: TokenRewards,
    positive: Tensor,
    negative: Tensor,
    mask: Tensor,
    chosen: Tensor,
    positive_again: Tensor | None = None,
) -> RewardDiagnostics:
    """Diagnostics of `token_rewards`. positive_again [N, T]: the positive face scored a second time (D20)."""
    tokens = mask.sum(1)
    right_face = torch.where(chosen[:, None], positive > negative, negative > positive)
    total = found.importance.sum(1)
    agreement = (found.importance * right_face).sum(1) / torch.where(total > 0, total, torch.ones_like(total))
    noise = None
    if positive_again is not None:
        apart = (wide(positive) - wide(positive_again)).abs().masked_fill(~mask, 0.0)
        noise = apart.sum(1) / tokens.clamp(min=1)
    return RewardDiagnostics(tokens, (found.rewards != 0).sum(1), total / tokens.clamp(min=1), agreement, noise)
