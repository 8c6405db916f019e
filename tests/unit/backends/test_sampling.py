"""What every sampler shares: temperature, top-k and top-p of a distribution, against their slow definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import mix_logits
from nemo_pivotrl.backends.sampling import truncate


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def slow_truncate(probabilities: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(probabilities))]
    tempered = [p ** (1 / temperature) for p in probabilities]
    kept = order[: top_k or len(order)]
    mass, reached, nucleus = sum(tempered[i] for i in kept), 0.0, []
    for i in kept:
        if reached < top_p or top_p == 1 or not nucleus:
            nucleus.append(i)
            reached += tempered[i] / mass
    total = sum(tempered[i] for i in nucleus)
    return [tempered[i] / total if i in nucleus else 0.0 for i in range(len(probabilities))]


def test_truncation_equals_the_slow_definition_with_settings_of_each_row() -> None:
    choices = list(itertools.product([0.0, 0.5, 1.0, 2.0], [0, 1, 3, 50], [0.0, 0.3, 0.9, 1.0]))
    log_probs = torch.randn(
        len(choices), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).log_softmax(1)
    temperature, top_k, top_p = (torch.tensor(x) for x in zip(*choices, strict=True))
    found = truncate(log_probs, temperature, top_k, top_p).exp()
    for r, (t, k, p) in enumerate(choices):
        assert found[r].tolist() == pytest.approx(slow_truncate(log_probs[r].exp().tolist(), t, k, p), abs=1e-6), r


def test_truncation_breaks_ties_by_id_and_comes_after_mixing() -> None:
    off = (torch.ones(1), torch.tensor([1]), torch.ones(1))
    assert truncate(torch.zeros(1, 3).log_softmax(1), *off)[0].tolist() == [0.0, -math.inf, -math.inf]
    half = truncate(doubles([0.0, 0.0, -math.inf]), torch.ones(1), torch.zeros(1), torch.tensor([0.5]))
    assert half[0].tolist() == [0.0, -math.inf, -math.inf]  # the first token's mass reaches top-p
    tail = truncate(torch.tensor([[50.0, 1.0, 0.0]]).log_softmax(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    assert bool(tail.isfinite().all())  # top-p 1 keeps what the rounded mass has already passed
    patient, doctor = doubles([2.0, 1.0, 0.0]), doubles([-5.0, 0.0, 0.0])
    weights = (torch.ones(1), torch.ones(1, 1))
    after = truncate(mix_logits(patient, [doctor], *weights, 3), *off)
    before = mix_logits(truncate(patient.log_softmax(1), *off), [doctor], *weights, 3)  # the wrong order
    assert int(after.argmax()) == 1 and int(before.argmax()) == 0
