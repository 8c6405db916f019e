"""When a candidate's selection is known before all K rollouts are drawn, and what the drawn ones say about its hit rate. Pure.

Keep iff 0 < k < K and k < lambda*K (equation (4), `pivotrl.keep`). After s successes and f failures the final k lies between s and
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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from nemo_pivotrl.algorithms.selection import Rule, keep_pivot, statistics
from nemo_pivotrl.config import ProfileStage, Select
from nemo_pivotrl.core.errors import InputError, Problem


@dataclass(frozen=True)
class StoppingRule:
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
            return self._table[successes][failures]
        return 0 if self.settled(rewards) else min(left, max(self.min_wave, 1))

    @cached_property
    def _table(self) -> tuple[tuple[int, ...], ...]:
        """[successes][failures] -> samples to ask for: the least number after which the candidate may be finished."""
        size = self.count
        nearest = [[0] * (size + 1 - s) for s in range(size + 1)]
        for drawn in range(size - 1, -1, -1):
            for s in range(drawn + 1):
                f = drawn - s
                finished = self.disagreement(s, f) <= self.error_rate
                nearest[s][f] = 0 if finished else 1 + min(nearest[s + 1][f], nearest[s][f + 1])
        return tuple(
            tuple(min(size - s - f, max(n, self.min_wave)) if n else 0 for f, n in enumerate(row))
            for s, row in enumerate(nearest)
        )

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
        if self.rule == "all":
            return bool(rewards)
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
        asked = StoppingRule(self.count, rule, lambda_diff, lambda_diff, inclusive, self.error_rate, self.prior)
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


def _selected(plan: StoppingRule, lambda_diff: float, successes: int, count: int) -> bool:
    """Whether so many successes of so many rollouts make a pivot. `random` counts as many as `adv` would."""
    rule: Rule = "adv" if plan.rule == "random" else plan.rule
    return keep_pivot(statistics([1.0] * successes + [0.0] * (count - successes)), rule, lambda_diff, plan.inclusive)


@lru_cache(maxsize=65536)
def _final(plan: StoppingRule, lambda_diff: float) -> tuple[bool, ...]:
    """For every k of K whether it is kept."""
    return tuple(_selected(plan, lambda_diff, k, plan.count) for k in range(plan.count + 1))


def _fixed(plan: StoppingRule, lambda_diff: float, successes: int, failures: int) -> bool:
    reachable = _final(plan, lambda_diff)[successes : plan.count - failures + 1]
    return all(reachable) or not any(reachable)


def _chance_of_another(plan: StoppingRule, lambda_diff: float, successes: int, failures: int) -> float:
    now = _selected(plan, lambda_diff, successes, successes + failures)
    a, b = plan.prior[0] + successes, plan.prior[1] + failures
    final, left = _final(plan, lambda_diff), plan.count - successes - failures
    return math.fsum(beta_binomial(more, left, a, b) for more in range(left + 1) if final[successes + more] is not now)


def beta_binomial(k: int, n: int, a: float, b: float) -> float:
    """Probability of k successes in n draws whose common rate has a Beta(a, b) distribution."""
    log = math.lgamma
    ways = log(n + 1) - log(k + 1) - log(n - k + 1)
    return math.exp(ways + log(a + k) + log(b + n - k) - log(a + b + n) - log(a) - log(b) + log(a + b))


def expected_rollouts(plan: StoppingRule, prior: tuple[float, float]) -> float:
    """Mean rollouts a candidate under hit rates with a Beta(a, b) distribution: what a forecast multiplies."""
    if not plan.curtailed:
        return float(plan.count)
    (a, b), total = prior, 0.0
    chance: dict[tuple[int, int], float] = {(0, 0): 1.0}
    while chance:
        (s, f), mass = min(chance.items(), key=lambda kv: sum(kv[0]))
        del chance[s, f]
        more = plan.ask([1.0] * s + [0.0] * f)
        total += mass * more
        for k in range(more + 1) if more else ():
            at = (s + k, f + more - k)
            chance[at] = chance.get(at, 0.0) + mass * beta_binomial(k, more, a + s, b + f)
    return total


@lru_cache(maxsize=65536)
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


def plan_of(settings: ProfileStage, select: Select) -> StoppingRule:
    """How many rollouts a candidate gets. Raises InputError for an interval or prior that is none."""
    given = settings.lambda_interval or (select.lambda_diff, select.lambda_diff)
    problems = []
    if len(given) != 2 or not 0 <= given[0] <= select.lambda_diff <= given[1] <= 1:
        remedy = f"give [low, high] around select.lambda_diff, which is {select.lambda_diff}"
        problems.append(Problem("recipe", None, "profile.lambda_interval", str(list(given)), remedy))
    if len(settings.prior) != 2 or min(settings.prior, default=0.0) <= 0:
        problems.append(
            Problem("recipe", None, "profile.prior", str(list(settings.prior)), "give [a, b], both positive")
        )
    if problems:
        raise InputError(problems)
    return StoppingRule(
        settings.num_generations,
        "adv" if select.rule == "random" else select.rule,
        given[0],
        given[1],
        select.inclusive,
        settings.error_rate if settings.curtail == "sequential" else 0.0,
        (settings.prior[0], settings.prior[1]),
        min(settings.min_wave, settings.num_generations),
        settings.curtail != "none",
    )
