"""How much signal token rewards hold, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import token_rewards
from nemo_pivotrl.algorithms.reward_diagnostics import reward_diagnostics


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_diagnostics_of_a_hand_computed_pair() -> None:
    positive = doubles([-1.0, -2.0, -4.0, 9.0], [-3.0, -1.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0])
    negative = doubles([-2.0, -2.5, -1.0, 9.0], [-1.0, -4.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    chosen = torch.tensor([True, False, True])
    found = token_rewards(positive, negative, mask, chosen, 1.0, 0.5, 1e-6)
    said = reward_diagnostics(found, positive, negative, mask, chosen, positive + doubles([0.3, -0.3, 0.0, 5.0]))
    assert said.tokens.tolist() == [3, 2, 0]
    assert said.kept.tolist() == [2, 2, 0]  # Delta 1, 0.5, 3 (mean 1.5): 0.5 gives tanh(1/3) = 0.32
    assert said.importance.tolist() == pytest.approx([1.5, 2.5, 0.0])
    assert said.agreement.tolist() == pytest.approx([1.5 / 4.5, 2 / 5, 0.0])
    assert said.noise is not None and said.noise.tolist() == pytest.approx([0.2, 0.3, 0.0])
    assert reward_diagnostics(found, positive, negative, mask, chosen).noise is None
