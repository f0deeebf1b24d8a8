"""Tests, bounds and power of evaluations: values by hand, and promises that are kept in draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpt.offline.evaluation.significance import (
    compare_answers,
    compare_nats,
    compare_shares,
    compare_values,
    items_for_answers,
    items_for_mean,
    largest_drop,
    mcnemar_p_value,
    power_of_answers,
    power_of_mean,
)

DRAWS = 20_000


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [
        (0, 0, 1 / 2),
        (8, 0, 1 / 2**9),
        # of six coins: one way to six heads, six ways to five
        (5, 1, (1 + 6 / 2) / 64),
        (3, 3, (1 + 6 + 15 + 20 / 2) / 64),
        (1, 5, (1 + 6 + 15 + 20 + 15 + 6 / 2) / 64),
    ],
)
def test_mid_p_is_that_of_a_hand_count(lost: int, won: int, expected: float) -> None:
    assert mcnemar_p_value(lost, won) == pytest.approx(expected, rel=1e-12)


def test_mid_p_of_thousands_of_changes_is_that_of_the_normal_law() -> None:
    # (lost - won) / sqrt(lost + won) = 3; its tail is 0.00135
    assert mcnemar_p_value(5150, 4850) == pytest.approx(0.00135, abs=1e-5)


def draws(count: int, drop: float, churn: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lost, won and how often for each pair that was drawn."""
    generator = np.random.default_rng([count, round(1e6 * drop), round(1e6 * churn)])
    shares = [drop + churn / 2, churn / 2, 1 - drop - churn]
    drawn = generator.multinomial(count, shares, size=DRAWS)[:, :2]
    pairs, times = np.unique(drawn, axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], times / DRAWS


def margin(share: float) -> float:
    """Return three standard errors of a share over the draws."""
    return 3 * math.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize(("count", "churn"), [(100, 0.1), (500, 0.02), (500, 0.3), (2000, 0.1)])
def test_unchanged_models_are_called_worse_as_rarely_as_the_level_says(
    count: int, churn: float
) -> None:
    for level in (0.01, 0.05):
        lost, won, share = draws(count, 0.0, churn)
        called = np.array([mcnemar_p_value(*pair) <= level for pair in zip(lost, won, strict=True)])
        assert share[called].sum() <= level + margin(level)


@pytest.mark.parametrize(
    ("count", "drop", "churn"),
    [(30, 0.3, 0.1), (200, 0.05, 0.0), (500, 0.02, 0.02), (1000, 0.03, 0.04), (2000, 0.0, 0.1)],
)
def test_the_bound_is_below_the_true_drop_in_at_most_five_percent(
    count: int, drop: float, churn: float
) -> None:
    lost, won, share = draws(count, drop, churn)
    bounds = np.array(
        [largest_drop(*pair, count, 0.95) for pair in zip(lost, won, strict=True)],
    )
    assert share[bounds < drop].sum() <= 0.05 + margin(0.05)


@pytest.mark.parametrize("count", [30, 300, 3000])
def test_the_bound_holds_exactly_where_only_few_answers_are_lost(count: int) -> None:
    """Without the continuity correction it errs in up to 7 % of the cases."""
    bounds = np.array([largest_drop(lost, 0, count, 0.95) for lost in range(40)])
    for expected in np.arange(0.5, 12, 0.1):
        drop = expected / count
        missed = 0.0
        for lost in range(min(40, count)):
            if bounds[lost] < drop:
                ways = math.comb(count, lost)
                missed += ways * drop**lost * (1 - drop) ** (count - lost)
        assert missed <= 0.05


@pytest.mark.parametrize(
    ("count", "drop", "churn", "level"),
    [
        (12, 0.6, 0.1, 0.01),
        (200, 0.1, 0.05, 0.01),
        (1000, 0.03, 0.04, 0.01),
        (500, 0.1, 0.3, 0.001),
    ],
)
def test_power_is_that_of_draws(count: int, drop: float, churn: float, level: float) -> None:
    lost, won, share = draws(count, drop, churn)
    seen = np.array([mcnemar_p_value(*pair) <= level for pair in zip(lost, won, strict=True)])
    power = power_of_answers(count, drop, churn, level)
    assert share[seen].sum() == pytest.approx(power, abs=margin(power) + 1e-9)


def test_three_points_take_a_thousand_answers_if_four_percent_change_anyway() -> None:
    assert power_of_answers(1000, 0.03, 0.04, 0.01) == pytest.approx(0.91, abs=0.005)
    assert power_of_answers(2000, 0.03, 0.10, 0.01) == pytest.approx(0.92, abs=0.005)


def test_the_number_of_items_that_is_asked_for_is_enough_and_a_tenth_less_is_not() -> None:
    for drop, churn in ((0.03, 0.04), (0.02, 0.1), (0.4, 0.1)):
        needed = items_for_answers(drop, churn, 0.01)
        assert power_of_answers(needed, drop, churn, 0.01) >= 0.8
        assert power_of_answers(math.floor(0.85 * needed), drop, churn, 0.01) < 0.8
    needed = items_for_mean(0.02, 0.03, 400, 0.01)
    assert power_of_mean(0.02, 0.03 * math.sqrt(400 / needed), 0.01) == pytest.approx(0.8, abs=1e-3)


def test_answers_are_counted_both_ways() -> None:
    before = np.array([1.0, 1, 1, 0, 0, 1, 1, 0])
    after = np.array([1.0, 0, 0, 1, 0, 0, 1, 0])
    change = compare_answers(before, after, 0.95, 0.01)
    assert (change.lost, change.won, change.drop) == (3, 1, 0.25)
    assert change.p_value == pytest.approx((1 + 4 / 2) / 16)
    assert not change.proven


@pytest.mark.parametrize("count", [3, 30])
def test_marks_that_all_changed_alike_are_no_more_certain_than_answers(count: int) -> None:
    marks = np.linspace(0.3, 0.9, count)
    answers = np.ones(count)
    same = compare_values(marks, marks, 0.95, 0.01)
    unchanged = compare_answers(answers, answers, 0.95, 0.01)
    assert (same.drop, same.stderr) == (0, unchanged.stderr)
    assert same.upper_bound == unchanged.upper_bound > 0
    lower = compare_values(marks, marks - 0.2, 0.95, 0.01)
    assert lower.drop == pytest.approx(0.2)
    assert lower.upper_bound == pytest.approx(0.2 + same.upper_bound)
    assert lower.proven == (count == 30)


def coverage(bounds: list[float], truth: float) -> float:
    return float(np.mean(np.array(bounds) < truth))


def test_bounds_of_means_nats_and_shares_hold_in_draws() -> None:
    """2,000 draws know 5 % to 1.5 points at three standard errors."""
    generator = np.random.default_rng(11)
    values = []
    nats = []
    shares = []
    proven = 0
    for _ in range(2000):
        before = generator.beta(2, 1, 60)
        after = before - 0.05 + generator.normal(0, 0.2, 60)
        values.append(compare_values(before, after, 0.95, 0.01).upper_bound)
        sizes = generator.gamma(4.0, 100.0, 60)
        rise = compare_nats(sizes, sizes * generator.normal(1.02, 0.05, 60), 0.95, 0.01)
        nats.append(rise.upper_bound)
        right = generator.binomial(400, 0.7) / 400
        now = generator.binomial(400, 0.66) / 400
        shares.append(compare_shares(right, now, (400, 400), 0.95, 0.01).upper_bound)
        again = generator.binomial(400, 0.7) / 400
        proven += compare_shares(right, again, (400, 400), 0.95, 0.01).proven
    assert coverage(values, 0.05) <= 0.065
    assert coverage(nats, 0.02) <= 0.07
    assert coverage(shares, 0.04) <= 0.065
    assert proven / 2000 <= 0.017
