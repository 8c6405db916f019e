"""Intervals of means."""

from __future__ import annotations

import numpy as np

BOOTSTRAPS = 2000


def bootstrap(means: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of item means [items]."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(means), (BOOTSTRAPS, len(means)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means[draws].mean(1), [tail, 1 - tail])
    return float(low), float(high)
