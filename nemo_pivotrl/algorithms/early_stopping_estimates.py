"""What can be said of hit rates whose sampling stopped for what it had seen (`early_stopping.py`). Pure, exact, not in the paper.

The stopping rule decides which (successes, failures) a candidate can end at and in how many ways; given those ways, nothing else of
it matters. So k/n is replaced by an estimate without bias, and a test of two candidates counts ways instead of tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType

from nemo_pivotrl.algorithms.early_stopping import StoppingRule


@lru_cache(maxsize=64)
def endings(plan: StoppingRule) -> Mapping[tuple[int, int], tuple[int, int]]:
    """(successes, failures) at which binary sampling under `plan` ends -> (ways to get there, those whose first rollout succeeds).

    A candidate of hit rate p ends at (s, f) with probability ways * p^s * (1-p)^f: the stopping rule is in the ways alone.
    """
    reached: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (1, 0)}
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for drawn in range(plan.count + 1):
        for s in range(drawn + 1):
            if (s, drawn - s) not in reached:
                continue
            ways, lucky = reached[s, drawn - s]
            more = plan.ask([1.0] * s + [0.0] * (drawn - s))
            if not more:
                ends[s, drawn - s] = ways, lucky
                continue
            for k in range(more + 1):
                before = reached.get((s + k, drawn - s + more - k), (0, 0))
                here = lucky * math.comb(more, k) if drawn else math.comb(more - 1, k - 1) if k else 0
                reached[s + k, drawn - s + more - k] = before[0] + ways * math.comb(more, k), before[1] + here
    return MappingProxyType(ends)


def unbiased_rate(plan: StoppingRule, end: tuple[int, int]) -> Fraction:
    """Hit rate estimated from where sampling under `plan` ended, without the bias that stopping gives k/n; k/K for all K.

    It is the chance that the first rollout, itself without bias, was a success given the end (Girshick, Mosteller and Savage
    1946). Raises KeyError for an end that the plan does not have.
    """
    ways, lucky = endings(plan)[end]
    return Fraction(lucky, ways)


@lru_cache(maxsize=65536)
def same_rate_p_value(
    first: StoppingRule, first_end: tuple[int, int], second: StoppingRule, second_end: tuple[int, int]
) -> float:
    """Exact two-sided p-value of two candidates' having one hit rate, each sampled until its plan ended it.

    Given all successes and failures of both, the rate has no part in how they divide: the p-value is the share of divisions, by
    ways, whose shares of successes are at least as far apart. With the same K of both, and all of it, it is Fisher's exact test.
    Where stopping leaves few divisions it errs on the side of caution. Raises KeyError for ends that the plans do not have.
    """
    ours, theirs = endings(first), endings(second)
    s, f = first_end[0] + second_end[0], first_end[1] + second_end[1]

    def apart(one: tuple[int, int], two: tuple[int, int]) -> Fraction:
        return abs(Fraction(one[0], sum(one)) - Fraction(two[0], sum(two)))

    if first_end not in ours or second_end not in theirs:
        raise KeyError((first_end, second_end))
    whole = extreme = 0
    for end, (ways, _) in ours.items():
        other = (s - end[0], f - end[1])
        if other in theirs:
            whole += ways * theirs[other][0]
            if apart(end, other) >= apart(first_end, second_end):
                extreme += ways * theirs[other][0]
    return extreme / whole
