"""When a round of training ends, and which round's policy is the result: pure decisions on the rows of `metrics.jsonl`.

Re-profiling is not in the PivotRL paper. Nemotron 3 Ultra's report repeats profile and training "at saturation"; the two
signs of it are those of P16. Everything here follows from what a resumed run repeats bit by bit, so it decides the
same again; only the GPU-hours do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_pivotrl.config import Budget, Loop

Row = Mapping[str, Any]
"""One line of `metrics.jsonl`."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why training stops."""

    why: str
    """`retention`, `budget`, `std` or `gain`; of a whole run also `max_rounds`, `patience` or `no_pivots`."""
    text: str
    """With the figures."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Cost of work that counts."""

    rollouts: int = 0
    generated: int = 0
    """Tokens."""
    read: int = 0
    """Prompt tokens, a prompt once for all of its rollouts."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.rollouts + other.rollouts, self.generated + other.generated, self.read + other.read)

    def __mul__(self, times: int) -> Spent:
        return Spent(self.rollouts * times, self.generated * times, self.read * times)


def spent_of(rows: Sequence[Row]) -> Spent:
    """What training spent by its metrics, measurements included."""
    return Spent(*(round(sum(row.get(key, 0) for row in rows)) for key in COSTS))


COSTS = ("rollouts", "tokens_generated", "tokens_read")


def saturated(rows: Sequence[Row], loop: Loop) -> Ending | None:
    """Whether the pivots of a round have been used up.

    rows: of this round, step 0 included. Either the mean `reward_std` of the last `std_window` steps is below `std_ratio` of
    that of the first ones, or `val/accuracy` gained less than `min_gain` over the last `gain_window` validations.
    """
    stds = [float(row["reward_std"]) for row in rows if "reward_std" in row]
    if len(stds) >= 2 * loop.std_window:
        first, last = statistics.fmean(stds[: loop.std_window]), statistics.fmean(stds[-loop.std_window :])
        if last < loop.std_ratio * first:
            return Ending(
                "std", f"std of the rewards in a group {last:.4f}, in the first {loop.std_window} steps {first:.4f}"
            )
    accuracy = [float(row["val/accuracy"]) for row in rows if "val/accuracy" in row]
    if len(accuracy) > loop.gain_window:
        before, now = accuracy[-1 - loop.gain_window], accuracy[-1]
        if now - before < loop.min_gain - 1e-12:
            return Ending("gain", f"held-out accuracy {before:.4f} to {now:.4f} in {loop.gain_window} validations")
    return None


def held(change: float, high: float, loop: Loop) -> bool:
    """Whether the out-of-domain score has been kept. change: paired mean difference from the start policy; high: its upper bound."""
    return not (change < -loop.max_retention_loss and high < 0.0)


def retention_lost(rows: Sequence[Row], loop: Loop) -> Ending | None:
    """Whether the latest out-of-domain measurement ends the run."""
    for row in reversed(rows):
        if "retention/change" in row:
            change, low, high = (float(row[f"retention/{key}"]) for key in ("change", "low", "high"))
            if held(change, high, loop):
                return None
            return Ending(
                "retention", f"out-of-domain score {change:+.4f} [{low:+.4f}, {high:+.4f}] from the start policy"
            )
    return None


def exhausted(spent: Spent, hours: float, budget: Budget) -> Ending | None:
    """Which bound of the budget has been reached. hours: GPU-hours so far."""
    bounds = (
        ("rollouts", spent.rollouts, budget.rollouts),
        ("tokens", spent.generated + spent.read, budget.tokens),
        ("gpu_hours", hours, budget.gpu_hours),
    )
    for name, value, bound in bounds:
        if bound and value >= bound:
            return Ending("budget", f"budget.{name}={bound} is spent")
    return None


def impatient(accuracies: Sequence[float], loop: Loop) -> Ending | None:
    """Whether the last `patience` rounds gained nothing. accuracies: before the first round, then at the end of each."""
    best, idle = accuracies[0], 0
    for value in accuracies[1:]:
        idle = 0 if value >= best + loop.min_gain - 1e-12 and value > best else idle + 1
        best = max(best, value)
    if idle >= loop.patience:
        return Ending(
            "patience", f"{idle} rounds without a gain of {loop.min_gain} on the best held-out accuracy {best:.4f}"
        )
    return None


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard similarity of two pivot sets; 1 for two empty ones."""
    return len(first & second) / len(first | second) if first | second else 1.0
