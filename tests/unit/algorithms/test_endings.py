"""Endings of curtailed sampling: ways by hand, rates without bias, and a test that keeps its level."""

import itertools
import math
from fractions import Fraction

import pytest

from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.algorithms.early_stopping_estimates import endings, same_rate_p_value, unbiased_rate


def test_ways_to_every_ending_are_those_of_a_hand_drawn_tree() -> None:
    # K = 3, mixed: two are drawn; SF and FS end it, SS and FF draw the third
    assert endings(StoppingRule(3, "mixed")) == {
        (1, 1): (2, 1),
        (3, 0): (1, 1),
        (2, 1): (1, 1),
        (1, 2): (1, 0),
        (0, 3): (1, 0),
    }
    full = endings(StoppingRule(5, curtailed=False))
    assert full == {(k, 5 - k): (math.comb(5, k), math.comb(4, k - 1) if k else 0) for k in range(6)}


@pytest.mark.parametrize(
    "plan",
    [
        StoppingRule(8, "adv", 0.6, 0.6),
        StoppingRule(16, "adv", 0.2, 0.9, min_wave=4),
        StoppingRule(8, "mixed"),
        StoppingRule(8, "adv_with_zeros"),
        StoppingRule(16, "adv", 0.6, 0.6, error_rate=0.1),
        StoppingRule(7, curtailed=False),
    ],
)
def test_rates_of_endings_are_without_bias_where_plain_shares_are_not(plan: StoppingRule) -> None:
    for p in (Fraction(1, 20), Fraction(1, 3), Fraction(9, 10)):
        chance = {(s, f): ways * p**s * (1 - p) ** f for (s, f), (ways, _) in endings(plan).items()}
        assert sum(chance.values()) == 1
        assert sum(mass * unbiased_rate(plan, end) for end, mass in chance.items()) == p
        plain = sum(mass * Fraction(end[0], sum(end)) for end, mass in chance.items())
        assert (plain == p) is not plan.curtailed


def test_with_all_k_of_both_the_test_is_fishers() -> None:
    from scipy.stats import fisher_exact

    plan = StoppingRule(8, curtailed=False)
    for a, b in itertools.product(range(9), repeat=2):
        expected = fisher_exact([[a, 8 - a], [b, 8 - b]]).pvalue
        assert same_rate_p_value(plan, (a, 8 - a), plan, (b, 8 - b)) == pytest.approx(expected, rel=1e-12)
    # 1 of 4 against 4 of 4, by hand: C(4,1)C(4,4) = 4 of C(8,5) = 56, and as many on the other side
    four = StoppingRule(4, curtailed=False)
    assert same_rate_p_value(four, (1, 3), four, (4, 0)) == 8 / 56


def test_the_test_of_curtailed_samples_keeps_its_level_where_fishers_table_would_not_know_the_stopping() -> None:
    first, second = StoppingRule(8, "adv", 0.6, 0.6), StoppingRule(8, curtailed=False)
    for p in (0.1, 0.5, 0.8):
        chances = [
            {end: ways * p ** end[0] * (1 - p) ** end[1] for end, (ways, _) in endings(plan).items()}
            for plan in (first, second)
        ]
        for level in (0.01, 0.05, 0.2, 0.5):
            below = sum(
                x * y
                for (a, x), (b, y) in itertools.product(chances[0].items(), chances[1].items())
                if same_rate_p_value(first, a, second, b) <= level
            )
            assert below <= level + 1e-12
    assert same_rate_p_value(first, (5, 0), second, (0, 8)) < 0.01
    with pytest.raises(KeyError):
        same_rate_p_value(first, (2, 0), second, (0, 8))  # no ending of that plan
