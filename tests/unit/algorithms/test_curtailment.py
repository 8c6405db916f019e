"""Curtailed sampling against drawing everything: the same selection on the same outcomes, and never a sample too many."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from nemo_pivotrl.algorithms.early_stopping import StoppingRule, beta_binomial, expected_rollouts, interval
from nemo_pivotrl.algorithms.selection import Rule, keep_pivot, statistics

RULES: tuple[Rule, ...] = ("adv", "mixed", "adv_with_zeros", "all")


def drawn(plan: StoppingRule, outcomes: list[float]) -> list[float]:
    """The prefix of a candidate's outcomes that the plan draws."""
    seen: list[float] = []
    while more := plan.ask(seen):
        assert more > 0 and len(seen) + more <= plan.count
        seen += outcomes[len(seen) : len(seen) + more]
    return seen


def kept(rewards: list[float], rule: Rule, lam: float, inclusive: bool) -> bool:
    return keep_pivot(statistics(rewards), rule, lam, inclusive)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.25, 0.3, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("min_wave", [1, 3])
def test_every_outcome_of_eight_is_selected_as_all_eight_are(
    rule: Rule, lam: float, inclusive: bool, min_wave: int
) -> None:
    plan = StoppingRule(8, rule, lam, lam, inclusive, min_wave=min_wave)
    for bits in itertools.product([0.0, 1.0], repeat=8):
        few = drawn(plan, list(bits))
        assert kept(few, rule, lam, inclusive) == kept(list(bits), rule, lam, inclusive), (bits, few)


def test_the_selection_of_sixteen_by_hand() -> None:
    """lambda 0.6: 1 to 9 successes are kept. Seven failures and a success are enough, as ten successes are."""
    plan = StoppingRule(16)
    assert plan.ask([]) == 8, "before eight are drawn nothing can be known"
    assert plan.ask([0.0] * 7 + [1.0]) == 0
    assert plan.ask([0.0] * 8) == 1, "one success would settle it"
    assert plan.ask([1.0] * 8) == 2 and plan.ask([1.0] * 10) == 0
    assert plan.ask([1.0] * 9) == 1, "nine may still be all there are"
    assert plan.ask([0.0] * 15) == 1 and plan.ask([0.0] * 16) == 0
    assert plan.ask([1.0] * 4 + [0.0] * 4) == 3


def test_stopping_one_draw_earlier_would_select_another_set() -> None:
    """The rule is sharp: wherever it says to draw on, two ways of going on end in different selections."""
    plan = StoppingRule(8, "adv", 0.6, 0.6)
    for n in range(8):
        for successes in range(n + 1):
            seen = [1.0] * successes + [0.0] * (n - successes)
            ends = {kept(seen + list(rest), "adv", 0.6, False) for rest in itertools.product([0.0, 1.0], repeat=8 - n)}
            assert (len(ends) == 1) == plan.settled(seen), seen


def test_waves_never_overshoot_and_a_least_wave_does_by_less_than_itself() -> None:
    rng = random.Random(3)
    one_by_one, plan, four = StoppingRule(16), StoppingRule(16), StoppingRule(16, min_wave=4)
    for _ in range(400):
        rate = rng.random()
        outcomes = [float(rng.random() < rate) for _ in range(16)]
        least = next(n for n in range(17) if one_by_one.settled(outcomes[:n]))
        assert len(drawn(plan, outcomes)) == least
        assert least <= len(drawn(four, outcomes)) < least + 4


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.6), (0.5, 0.9), (0.59, 0.61)])
def test_an_interval_of_lambdas_stays_decidable_and_what_is_outside_it_is_not(low: float, high: float) -> None:
    rng = random.Random(5)
    plan, undecided = StoppingRule(16, "adv", low, high), 0
    for _ in range(300):
        rate = rng.random()
        outcomes = [float(rng.random() < rate) for _ in range(16)]
        few = drawn(plan, outcomes)
        for lam in [low, high, *(low + (high - low) * rng.random() for _ in range(5))]:
            assert plan.decided_at(lam, "adv", False, few)
            assert kept(few, "adv", lam, False) == kept(outcomes, "adv", lam, False)
        undecided += not plan.decided_at(low / 2, "adv", False, few)
    assert undecided > 0


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), min_size=8, max_size=8), st.sampled_from(RULES), st.data())
@settings(max_examples=400, deadline=None)
def test_fractional_rewards_are_selected_alike(outcomes: list[float], rule: Rule, data: st.DataObject) -> None:
    lam = data.draw(st.sampled_from([0.25, 0.5, 0.6, 0.75, 1.0]))
    few = drawn(StoppingRule(8, rule, lam, lam), outcomes)
    assert kept(few, rule, lam, False) == kept(outcomes, rule, lam, False)


def test_off_draws_everything() -> None:
    plan = StoppingRule(16, curtailed=False)
    assert plan.ask([]) == 16 and plan.ask([1.0] * 15) == 1 and plan.ask([1.0] * 16) == 0


# ---- the sequential mode ----


def test_beta_binomial_is_a_distribution_with_the_hand_computed_values() -> None:
    assert math.fsum(beta_binomial(k, 12, 0.5, 2.0) for k in range(13)) == pytest.approx(1.0)
    assert beta_binomial(0, 3, 1.0, 1.0) == pytest.approx(0.25), "a flat prior makes every count as likely"
    assert beta_binomial(0, 1, 0.5, 8.5) == pytest.approx(8.5 / 9.0)


def test_sequential_stops_sooner_on_zeros_and_errs_at_its_rate_on_its_prior() -> None:
    exact, loose = StoppingRule(16), StoppingRule(16, error_rate=0.1, prior=(0.3, 0.3))
    assert len(drawn(exact, [0.0] * 16)) == 16 and len(drawn(loose, [0.0] * 16)) < 16
    rng = random.Random(7)
    errors, saved, tries = 0, 0, 6000
    for _ in range(tries):
        rate = rng.betavariate(0.3, 0.3)
        outcomes = [float(rng.random() < rate) for _ in range(16)]
        few = drawn(loose, outcomes)
        errors += kept(few, "adv", 0.6, False) != kept(outcomes, "adv", 0.6, False)
        saved += len(drawn(exact, outcomes)) - len(few)
    assert 0 < errors / tries <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / tries)
    assert saved > tries / 4


def test_the_chance_of_another_decision_by_hand() -> None:
    """After 15 failures one draw is left, which succeeds with chance 0.5/16 under the prior (0.5, 0.5)."""
    plan = StoppingRule(16, error_rate=0.01)
    assert plan.disagreement(0, 15) == pytest.approx(0.5 / 16)
    assert StoppingRule(16, error_rate=0.05).ask([0.0] * 15) == 0 and plan.ask([0.0] * 15) == 1
    assert plan.disagreement(1, 7) == 0.0 and StoppingRule(16).disagreement(0, 15) == 1.0


# ---- what is forecast and told ----


def test_expected_rollouts_is_the_mean_of_a_simulation() -> None:
    rng, plan = random.Random(11), StoppingRule(16, min_wave=2)
    counts = []
    for _ in range(4000):
        rate = rng.betavariate(0.5, 0.7)
        counts.append(len(drawn(plan, [float(rng.random() < rate) for _ in range(16)])))
    mean = sum(counts) / len(counts)
    assert expected_rollouts(plan, (0.5, 0.7)) == pytest.approx(mean, abs=0.25)
    assert expected_rollouts(StoppingRule(16, curtailed=False), (0.5, 0.5)) == 16


def test_intervals_cover_the_rate_after_curtailed_sampling() -> None:
    assert interval(0, 16) == pytest.approx((0.0, 0.1438), abs=1e-3) and interval(16, 0)[1] == 1.0
    assert interval(8, 8) == pytest.approx((0.2728, 0.7272), abs=1e-3), "Beta(8.5, 8.5), by table"
    rng, plan, covered, tries = random.Random(13), StoppingRule(16), 0, 3000
    for _ in range(tries):
        rate = rng.random()
        few = drawn(plan, [float(rng.random() < rate) for _ in range(16)])
        low, high = interval(int(sum(few)), len(few) - int(sum(few)))
        covered += low <= rate <= high
    assert covered / tries > 0.92
