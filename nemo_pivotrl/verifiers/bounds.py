"""What keeps a verdict cheap whatever the policy wrote: bounded JSON, and difflib's ratio with a budget.

Work is counted, not timed, so that the same action gets the same verdict on a busy machine.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, repeat
from typing import Any

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.types import Action

STEP = 8
"""Units of `Limits.max_work` that one inner step of difflib's search costs (measured: 80 to 150 ns)."""
SETUP = 15
"""Units that one character of either text costs before the search begins."""
LONG = 20_000
"""Characters of both texts from which their letters alone are compared first."""


class LimitExceeded(ValueError):
    """The action would take more work than its verdict may cost."""


def check_size(action: Action, limits: Limits) -> None:
    """Raises LimitExceeded for an action with too many calls or characters."""
    if len(action.calls) > limits.max_calls:
        raise LimitExceeded(f"{len(action.calls)} calls, at most {limits.max_calls}")
    size = len(action.content) + sum(len(c.name) + len(c.arguments) for c in action.calls)
    if size > limits.max_chars:
        raise LimitExceeded(f"{size} characters, at most {limits.max_chars}")


def decode_json(text: str, limits: Limits) -> Any:
    """The value of a JSON text. Raises ValueError when it is none, too deep, or has too many values."""
    if len(text) > limits.max_chars:
        raise ValueError(f"{len(text)} characters, at most {limits.max_chars}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, seen = [value], 0
    for _ in range(limits.max_depth + 1):
        seen += len(level)
        if seen > limits.max_values:
            raise ValueError(f"more than {limits.max_values} values")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A similarity of two texts, or a bound on it that decides all the same."""

    value: float
    exact: bool = True

    @property
    def figures(self) -> dict[str, float]:
        """For a verdict: `similarity`, or `similarity_bound` where it was not worked out to the end."""
        return {"similarity" if self.exact else "similarity_bound": self.value}


def ratio(first: str, second: str, max_work: int, at_least: float = 0.0) -> Ratio:
    """`difflib.SequenceMatcher(None, first, second).ratio()`, default heuristics included, at a bounded cost.

    The order of the arguments matters, as it does to difflib. When `max_work` is spent, what has been matched and what may
    yet be give bounds: one on the same side of `at_least` as the ratio is returned. Raises LimitExceeded where neither
    bound decides.
    """
    if first == second:
        return Ratio(1.0)
    total = len(first) + len(second)
    common = _common(first, second) if total > LONG else None
    if common is not None:
        if 2.0 * common / total < at_least:
            return Ratio(2.0 * common / total, exact=False)
        if SETUP * total > max_work:
            raise LimitExceeded(f"{len(first)} and {len(second)} characters to compare")
    matcher = SequenceMatcher(None, first, second)
    places: dict[str, list[int]] = matcher.b2j  # type: ignore[attr-defined]
    # what difflib's search visits for first[i]: every place of that character in `second` that it has indexed
    cost = {c: len(found) + 1 for c, found in places.items()}
    visits = [0, *accumulate(map(cost.get, first, repeat(1)))]
    matched, work = 0, SETUP * total
    pending = [(0, len(first), 0, len(second))]
    while pending:
        alo, ahi, blo, bhi = pending[-1]
        work += STEP * (visits[ahi] - visits[alo])
        if work > max_work:
            break
        pending.pop()
        i, j, size = matcher.find_longest_match(alo, ahi, blo, bhi)
        if size:
            matched += size
            parts = ((alo, i, blo, j), (i + size, ahi, j + size, bhi))
            pending += [part for part in parts if part[0] < part[1] and part[2] < part[3]]
    if not pending:
        return Ratio(2.0 * matched / total)
    sure = 2.0 * matched / total
    common = _common(first, second) if common is None else common
    possible = 2.0 * min(common, matched + sum(min(b - a, d - c) for a, b, c, d in pending)) / total
    if possible < at_least or (sure >= at_least and at_least > 0.0):
        return Ratio(possible if possible < at_least else sure, exact=False)
    raise LimitExceeded(f"more than {max_work} units of work to compare {len(first)} and {len(second)} characters")


def _common(first: str, second: str) -> int:
    """How many characters two texts share, wherever they stand."""
    return (Counter(first) & Counter(second)).total()
