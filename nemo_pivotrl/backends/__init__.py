"""Backends: what runs a model. `load` and its like give the one that a recipe names."""

from nemo_pivotrl.backends.base import Backend, Sampler, Scorer, TokenBatch, Trainer
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.loading import load, load_sampler, load_scorer

__all__ = [
    "Backend",
    "Sampler",
    "Scorer",
    "TokenBatch",
    "Trainer",
    "load",
    "load_sampler",
    "load_scorer",
    "policy_revision",
]
