"""When a candidate's selection is known before all K rollouts are drawn, and what the drawn ones say about its hit rate. Pure.

Keep iff 0 < k < K and k < lambda*K (Eq. 5, `pivotrl.keep`). After s successes and f failures the final k lies between s and
s + (K - s - f); as soon as `keep` is the same over all of that range, no remaining outcome can change the selection, and
drawing on buys nothing. Where k is 0 so far the range holds both answers until the last draw: a state that the policy never
solves costs all K. `Plan.ask` never asks for more samples at a time than must be drawn before the next decision is possible,
so waves waste nothing; `min_wave` trades a few wasted samples for fewer waves.

The sequential mode also stops where the two answers are unlikely to differ: the chance, under a Beta(a, b) prior of the hit
rate, that all K rollouts would decide otherwise than those drawn is at most `error_rate`. Averaged over a population with that
prior the stated rate holds; control candidates, which are drawn in full, measure it.

Not in the paper, which draws K rollouts of everything. The selected set is the paper's (exact), or differs at a stated rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType

from nemo_pivotrl.pivotrl import Rule, keep, statistics


@dataclass(frozen=True, slots=True)
class Plan:
    """How many rollouts a candidate gets: what selection must be able to decide, and how surely."""

    count: int
    """K: no candidate gets more."""
    rule: Rule = "adv"
    lambda_low: float = 0.6
    lambda_high: float = 0.6
    """Selection stays decidable for every lambda_diff in [lambda_low, lambda_high]."""
    inclusive: bool = False
    """k <= lambda*K keeps, instead of k < lambda*K."""
    error_rate: float = 0.0
    """0: stop only where nothing can change. Else the sequential mode's chance of another decision."""
    prior: tuple[float, float] = (0.5, 0.5)
    """a and b of the hit rate's Beta prior; the sequential mode's only."""
    min_wave: int = 1
    """At least so many samples are asked for at a time."""
    curtailed: bool = True
    """False: all K of everything."""

    def ask(self, rewards: Sequence[float]) -> int:
        """How many more samples to draw now, given the rewards so far (each in [0, 1]); 0 when the candidate is finished."""
        left = self.count - len(rewards)
        if left <= 0 or not self.curtailed:
            return max(0, left)
        successes = rewards.count(1.0)
        failures = rewards.count(0.0)
        if successes + failures == len(rewards):
            return _table(self)[successes][failures]
        return 0 if self.settled(rewards) else min(left, max(self.min_wave, 1))

    def settled(self, rewards: Sequence[float]) -> bool:
        """Whether no outcome of the rest would change the selection, or with an `error_rate` hardly any would.

        Rewards between 0 and 1 are settled by their possible means alone, in either mode.
        """
        if len(rewards) >= self.count:
            return True
        lows, highs = _extremes(rewards, self.count)
        if all(r in (0.0, 1.0) for r in rewards):
            successes = sum(r == 1.0 for r in rewards)
            return self.disagreement(successes, len(rewards) - successes) <= self.error_rate
        # means are monotonic in every outcome, and what differs already stays different
        apart = max(rewards) - min(rewards) if rewards else 0.0
        mixed = apart**2 / (2 * self.count) > 1e-12
        if self.rule == "mixed":
            return mixed
        slack = 1e-9
        surely_hard = highs < self.lambda_low - slack
        surely_easy = lows > self.lambda_high + slack
        return surely_easy or (surely_hard and (mixed or self.rule == "adv_with_zeros"))

    def disagreement(self, successes: int, failures: int) -> float:
        """Chance that all K rollouts select otherwise than these do, over every lambda of the interval; 0 where they cannot.

        1 where they can and the mode is exact, and before the first one. Binary rewards only.
        """
        if successes + failures == 0:
            return 1.0
        if all(_fixed(self, lam, successes, failures) for lam in self._lambdas()):
            return 0.0
        if self.error_rate <= 0.0:
            return 1.0
        return max(_chance_of_another(self, lam, successes, failures) for lam in self._lambdas())

    def decided_at(self, lambda_diff: float, rule: Rule, inclusive: bool, rewards: Sequence[float]) -> bool:
        """Whether samples drawn under this plan decide another rule or lambda, by the same certainty."""
        if len(rewards) >= self.count:
            return True
        asked = Plan(self.count, rule, lambda_diff, lambda_diff, inclusive, self.error_rate, self.prior)
        return asked.settled(rewards)

    def _lambdas(self) -> tuple[float, ...]:
        return _lambdas_between(self.lambda_low, self.lambda_high, self.count)


@lru_cache(maxsize=256)
def _lambdas_between(low: float, high: float, count: int) -> tuple[float, ...]:
    """Both ends, and one lambda of every kind between them: whom a lambda keeps changes only at multiples of 1/count."""
    halves = (j / (2 * count) for j in range(2 * count + 1))
    return tuple(sorted({low, high, *(lam for lam in halves if low < lam < high)}))


def _extremes(rewards: Sequence[float], count: int) -> tuple[float, float]:
    """Least and greatest mean that all `count` rewards can come to."""
    total = math.fsum(rewards)
    return total / count, (total + count - len(rewards)) / count


def _selected(plan: Plan, lambda_diff: float, successes: int, count: int) -> bool:
    """Whether so many successes of so many rollouts make a pivot. `random` counts as many as `adv` would."""
    rule: Rule = "adv" if plan.rule == "random" else plan.rule
    return keep(statistics([1.0] * successes + [0.0] * (count - successes)), rule, lambda_diff, plan.inclusive)


@lru_cache(maxsize=65536)
def _final(plan: Plan, lambda_diff: float) -> tuple[bool, ...]:
    """For every k of K whether it is kept."""
    return tuple(_selected(plan, lambda_diff, k, plan.count) for k in range(plan.count + 1))


def _fixed(plan: Plan, lambda_diff: float, successes: int, failures: int) -> bool:
    reachable = _final(plan, lambda_diff)[successes : plan.count - failures + 1]
    return all(reachable) or not any(reachable)


def _chance_of_another(plan: Plan, lambda_diff: float, successes: int, failures: int) -> float:
    now = _selected(plan, lambda_diff, successes, successes + failures)
    a, b = plan.prior[0] + successes, plan.prior[1] + failures
    final, left = _final(plan, lambda_diff), plan.count - successes - failures
    return math.fsum(beta_binomial(more, left, a, b) for more in range(left + 1) if final[successes + more] is not now)


def beta_binomial(k: int, n: int, a: float, b: float) -> float:
    """Probability of k successes in n draws whose common rate has a Beta(a, b) distribution."""
    log = math.lgamma
    ways = log(n + 1) - log(k + 1) - log(n - k + 1)
    return math.exp(ways + log(a + k) + log(b + n - k) - log(a + b + n) - log(a) - log(b) + log(a + b))


@lru_cache(maxsize=64)
def _table(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """[successes][failures] -> samples to ask for: the least number after which the candidate may be finished."""
    size = plan.count
    nearest = [[0] * (size + 1 - s) for s in range(size + 1)]
    for drawn in range(size - 1, -1, -1):
        for s in range(drawn + 1):
            f = drawn - s
            finished = plan.disagreement(s, f) <= plan.error_rate
            nearest[s][f] = 0 if finished else 1 + min(nearest[s + 1][f], nearest[s][f + 1])
    return tuple(
        tuple(min(size - s - f, max(n, plan.min_wave)) if n else 0 for f, n in enumerate(row))
        for s, row in enumerate(nearest)
    )


def expected_rollouts(plan: Plan, prior: tuple[float, float]) -> float:
    """Mean rollouts a candidate under hit rates with a Beta(a, b) distribution: what a forecast multiplies."""
    if not plan.curtailed:
        return float(plan.count)
    table, (a, b), total = _table(plan), prior, 0.0
    chance: dict[tuple[int, int], float] = {(0, 0): 1.0}
    while chance:
        (s, f), mass = min(chance.items(), key=lambda kv: sum(kv[0]))
        del chance[s, f]
        more = table[s][f]
        total += mass * more
        for k in range(more + 1) if more else ():
            at = (s + k, f + more - k)
            chance[at] = chance.get(at, 0.0) + mass * beta_binomial(k, more, a + s, b + f)
    return total


@lru_cache(maxsize=64)
def endings(plan: Plan) -> Mapping[tuple[int, int], tuple[int, int]]:
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


def unbiased_rate(plan: Plan, end: tuple[int, int]) -> Fraction:
    """Hit rate estimated from where sampling under `plan` ended, without the bias that stopping gives k/n; k/K for all K.

    It is the chance that the first rollout, itself without bias, was a success given the end (Girshick, Mosteller and Savage
    1946). Raises KeyError for an end that the plan does not have.
    """
    ways, lucky = endings(plan)[end]
    return Fraction(lucky, ways)


@lru_cache(maxsize=65536)
def same_rate_p_value(first: Plan, first_end: tuple[int, int], second: Plan, second_end: tuple[int, int]) -> float:
    """Exact two-sided p-value of two candidates' having one hit rate, each sampled until its plan ended it.

    Given all successes and failures of both, the rate has no part in how they divide: the p-value is the share of divisions, by
    ways, whose shares of successes are at least as far apart. With the same K of both, and all of it, it is Fisher's exact test.
    Raises KeyError for ends that the plans do not have.
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


def interval(successes: int, failures: int, confidence: float = 0.95) -> tuple[float, float]:
    """Jeffreys interval of a hit rate: equal tails of Beta(s + 1/2, f + 1/2), its lower end 0 for s = 0, its upper 1 for f = 0.

    It depends on the counts alone and not on why sampling stopped, so it may be used after curtailed sampling (Brown, Cai and
    DasGupta 2001 recommend it for small counts).
    """
    from scipy.special import betaincinv

    tail = (1.0 - confidence) / 2
    low = float(betaincinv(successes + 0.5, failures + 0.5, tail)) if successes else 0.0
    high = float(betaincinv(successes + 0.5, failures + 0.5, 1.0 - tail)) if failures else 1.0
    return low, high
