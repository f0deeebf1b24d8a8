"""Bounds on lost replies, the betting process, and how many prompts it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpt.guard.generation.outcomes import (
    BETS,
    Measure,
    Outcomes,
    bet,
    green_power,
    prompts_needed,
    share_above,
    share_below,
)
from cpt.guard.yardstick import GREEN_ERROR


def outcomes(num_prompts: int, lost: int = 0, won: int = 0, failed: int = 0) -> Outcomes:
    """Return outcomes of prompts of which so many failed before."""
    return Outcomes(
        num_prompts=num_prompts,
        num_before=num_prompts - failed,
        num_now=num_prompts - failed - lost + won,
        lost=lost,
        won=won,
    )


def test_pairs_are_counted_by_what_changed() -> None:
    before = [True, True, True, False, False]
    now = [True, False, False, True, False]
    found = Outcomes.of(before, now)
    assert (found.num_prompts, found.num_before, found.num_now) == (5, 3, 2)
    assert (found.lost, found.won) == (2, 1)
    assert found.loss_points("format") == 40.0
    assert found.loss_points("accuracy") == pytest.approx(20.0)


def test_six_failures_of_six_hundred_keep_two_points() -> None:
    """The figure of the requirement: upper 95 % bound 1.96 %."""
    assert outcomes(600, lost=6).upper_points("format", 0.05) == pytest.approx(1.964, abs=5e-4)
    assert outcomes(600, lost=7).upper_points("format", 0.05) > 2.0


@pytest.mark.parametrize(("count", "trials"), [(0, 300), (3, 100), (50, 100), (100, 100)])
def test_bounds_are_the_shares_at_which_the_count_becomes_unlikely(count: int, trials: int) -> None:
    error = 0.03
    above = share_below(count, trials, error)
    below = share_above(count, trials, error)
    assert below <= count / trials <= above
    if count < trials:
        at_most = sum(
            math.comb(trials, k) * above**k * (1 - above) ** (trials - k) for k in range(count + 1)
        )
        assert at_most == pytest.approx(error, rel=1e-6)
    if count:
        at_least = sum(
            math.comb(trials, k) * below**k * (1 - below) ** (trials - k)
            for k in range(count, trials + 1)
        )
        assert at_least == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("measure", ["format", "accuracy"])
def test_bounds_of_one_look_hold_as_often_as_they_say(measure: Measure) -> None:
    """2,000 looks at a model that loses 5 % of what passed before and wins 10 % of the rest."""
    random = np.random.default_rng(1)
    too_low = 0
    too_high = 0
    for _ in range(2000):
        failed = int(random.binomial(200, 0.2))
        lost = int(random.binomial(200 - failed, 0.05))
        won = int(random.binomial(failed, 0.1))
        found = outcomes(200, lost, won, failed)
        true_loss = 100 * (200 - failed) * 0.05 / 200
        if measure == "accuracy":
            true_loss -= 100 * failed * 0.1 / 200
        too_low += found.upper_points(measure, GREEN_ERROR) < true_loss
        too_high += found.lower_points(measure, GREEN_ERROR) > true_loss
    assert too_low / 2000 <= GREEN_ERROR
    assert too_high / 2000 <= GREEN_ERROR


def alarm_look(
    random: np.random.Generator, measure: Measure, lost: float, num_looks: int, threshold: float
) -> int | None:
    """Return the look at which the process alarms, of 200 fresh prompts each, at a line of 2."""
    won = 0.03 if measure == "accuracy" else 0.0
    statistic: list[float] = []
    for look in range(1, num_looks + 1):
        counts = random.multinomial(200, [lost + won, won, 1 - lost - 2 * won]).tolist()
        statistic = bet(statistic, outcomes(200, counts[0], counts[1]), measure, 2.0)
        if np.mean(statistic) >= threshold:
            return look
    return None


@pytest.mark.parametrize("measure", ["format", "accuracy"])
def test_a_loss_at_the_line_rarely_alarms_and_four_times_the_line_soon(measure: Measure) -> None:
    """At most 10 % of 300 runs of 20 looks alarm: the threshold of one process is looks / 0.1."""
    random = np.random.default_rng(2)
    threshold = 20 / 0.1
    at_line = [alarm_look(random, measure, 0.02, 20, threshold) for _ in range(300)]
    num_false = sum(look is not None for look in at_line)
    assert num_false <= 30
    beyond = [alarm_look(random, measure, 0.08, 20, threshold) for _ in range(50)]
    assert all(look is not None and look <= 6 for look in beyond)


def test_without_the_share_of_the_line_the_process_alarms_at_nothing() -> None:
    """The correction is needed: betting against a line of 0 calls a harmless loss one."""
    statistic: list[float] = []
    for _ in range(20):
        statistic = bet(statistic, outcomes(200, lost=4), "format", 0.2)
    assert np.mean(statistic) > 2000
    statistic = []
    for _ in range(20):
        statistic = bet(statistic, outcomes(200, lost=4), "format", 2.0)
    assert np.mean(statistic) < 200


def test_where_all_passed_before_nothing_can_be_won() -> None:
    """19 of 24 answers lost is certain beyond half of 50 points, at a false alarm of 1 in 4,000."""
    assert outcomes(24, lost=19).lower_points("accuracy", 1 / 4000) > 25
    assert outcomes(24, lost=14, failed=5).lower_points("accuracy", 1 / 4000) < 25


def test_what_was_won_counts_in_accuracy_and_not_in_format() -> None:
    lost = outcomes(100, lost=10, failed=20)
    churn = outcomes(100, lost=10, won=10, failed=20)
    assert bet([], churn, "accuracy", 2.0) < bet([], lost, "accuracy", 2.0)
    assert bet([], churn, "format", 2.0) == bet([], lost, "format", 2.0)
    assert churn.upper_points("accuracy", 0.05) < lost.upper_points("accuracy", 0.05)


def test_a_model_that_lost_everything_gives_finite_statistics() -> None:
    statistic: list[float] = []
    for _ in range(50):
        statistic = bet(statistic, outcomes(5000, lost=5000), "accuracy", 2.0)
    assert len(statistic) == len(BETS)
    assert all(math.isfinite(value) for value in statistic)


@pytest.mark.parametrize(
    ("measure", "tolerance"), [("format", 2.0), ("accuracy", 5.0), ("accuracy", 10.0)]
)
def test_needed_prompts_are_enough_and_half_of_them_are_not(
    measure: Measure, tolerance: float
) -> None:
    needed = prompts_needed(measure, tolerance)
    assert needed <= 300
    assert green_power(measure, needed, tolerance) >= 0.9
    assert green_power(measure, needed // 2, tolerance) < 0.9


def test_power_is_the_share_of_simulated_looks_that_are_green() -> None:
    random = np.random.default_rng(3)
    green = 0
    for _ in range(2000):
        lost = int(random.binomial(200, 0.025))
        won = int(random.binomial(50, 0.1))
        green += outcomes(250, lost, won, 50).upper_points("accuracy", GREEN_ERROR) < 5.0
    assert green_power("accuracy", 250, 5.0) == pytest.approx(green / 2000, abs=0.03)
