"""What keeps a verdict cheap whatever the policy wrote: bounded JSON, and difflib's ratio with a budget.

Work is counted, not timed, so that the same action gets the same verdict on a busy machine.
"""

from __future__ import annotations

import json
from collections import Counter
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

from nemo_pivotrl.config import Limits
from nemo_pivotrl.records import Action

SMALL = 250_000
"""Below this product of lengths the ratio is always computed in full: a few milliseconds at worst."""
STEP = 4
"""Units of `Limits.max_work` that one inner step of difflib's search costs (measured: about 80 ns)."""


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


def ratio(first: str, second: str, max_work: int, at_least: float = 0.0) -> float:
    """`difflib.SequenceMatcher(None, first, second).ratio()`, default heuristics included, at a bounded cost.

    The order of the arguments matters, as it does to difflib. Where the exact number would be dear and an upper bound
    already lies below `at_least`, that bound is returned. Raises LimitExceeded when it is undecided after `max_work`.
    """
    if first == second:
        return 1.0
    total = len(first) + len(second)
    dear = len(first) * len(second) > SMALL
    if dear:
        bound = 2.0 * min(len(first), len(second)) / total
        if bound >= at_least:
            bound = 2.0 * (Counter(first) & Counter(second)).total() / total
        if bound < at_least:
            return bound
    matcher = SequenceMatcher(None, first, second)
    # what difflib's search visits for first[i]: every place of that character in `second` that it has indexed
    visits = [0, *accumulate(len(matcher.b2j.get(c, ())) + 1 for c in first)]
    matched, work = 0, 0
    pending = [(0, len(first), 0, len(second))]
    while pending:
        alo, ahi, blo, bhi = pending.pop()
        work += STEP * (visits[ahi] - visits[alo])
        if work > max_work:
            raise LimitExceeded(
                f"more than {max_work} units of work to compare {len(first)} and {len(second)} characters"
            )
        i, j, size = matcher.find_longest_match(alo, ahi, blo, bhi)
        if not size:
            continue
        matched += size
        pending += [
            part
            for part in ((alo, i, blo, j), (i + size, ahi, j + size, bhi))
            if part[0] < part[1] and part[2] < part[3]
        ]
        if dear:
            reachable = matched + sum(min(b - a, d - c) for a, b, c, d in pending)
            if 2.0 * reachable / total < at_least:
                return 2.0 * reachable / total
    return 2.0 * matched / total if total else 1.0
