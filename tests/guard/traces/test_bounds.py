"""Bounds of a mean hold as often as they say, whatever the distribution, and are worth having."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.guard.score import Floats
from cpt.guard.traces.bounds import lower_bound, upper_bound, values_needed

CAP = 1.0
RUNS = 200
ERROR = 0.05


def draws(shape: str, count: int, seed: int) -> Floats:
    """Values from 0 to CAP with the mean of `mean_of`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    if shape == "exponential":
        return np.minimum(generator.exponential(0.05, count), CAP)
    if shape == "rare":  # 4 % of the traces are lost, nothing else has changed
        return np.where(generator.random(count) < 0.04, CAP, 0.0)
    return np.minimum(generator.lognormal(-4.0, 1.5, count), CAP)


def mean_of(shape: str) -> float:
    if shape == "rare":
        return 0.04
    return float(draws(shape, 1_000_000, 10_000).mean())


@pytest.mark.parametrize("shape", ["exponential", "rare", "lognormal"])
@pytest.mark.parametrize("count", [30, 200])
def test_bounds_are_wrong_no_more_often_than_they_say(shape: str, count: int) -> None:
    mean = mean_of(shape)
    too_high = 0
    too_low = 0
    for seed in range(RUNS):
        values = draws(shape, count, seed)
        too_high += lower_bound(values, ERROR) > mean
        too_low += upper_bound(values, CAP, ERROR) < mean
    # 20 wrong ones of 200 have a chance below 0.3 % if each is wrong in 5 % of cases
    assert too_high < 20 and too_low < 20, (too_high, too_low)


def test_normal_bound_would_break_the_promise() -> None:
    """The reason for bets: the same draws, with mean + 1.645 standard errors."""
    wrong = 0
    for seed in range(RUNS):
        values = draws("rare", 30, seed)
        wrong += values.mean() + 1.645 * values.std(ddof=1) / np.sqrt(30) < mean_of("rare")
    assert wrong > 50, wrong


def test_bounds_enclose_the_mean_of_the_values() -> None:
    for seed in range(20):
        values = draws("exponential", 100, seed)
        assert lower_bound(values, ERROR) < values.mean() < upper_bound(values, CAP, ERROR)


def test_bounds_of_values_that_are_all_zero() -> None:
    values = np.zeros(200)
    assert lower_bound(values, ERROR) == 0
    assert 0 < upper_bound(values, CAP, ERROR) < 0.1


def test_smaller_error_gives_wider_bounds() -> None:
    values = draws("exponential", 200, 0)
    assert lower_bound(values, 1e-5) < lower_bound(values, 0.05)
    assert upper_bound(values, CAP, 1e-3) > upper_bound(values, CAP, 0.05)


@pytest.mark.parametrize(("mean", "error"), [(0.05, 0.05), (0.2, 1e-5)])
def test_number_of_values_asked_for_decides_in_nine_of_ten_cases(mean: float, error: float) -> None:
    line = 0.1
    decided = {}
    needed = values_needed(mean, line, CAP, error)
    for count in (needed // 2, needed):
        found = 0
        for seed in range(RUNS):
            generator = np.random.Generator(np.random.PCG64(seed))
            values = np.minimum(generator.exponential(mean, count), CAP)
            if mean < line:
                found += upper_bound(values, CAP, error) < line
            else:
                found += lower_bound(values, error) > line
        decided[count] = found / RUNS
    assert decided[needed] >= 0.86, decided  # 0.9, less two standard errors
    assert decided[needed // 2] < 0.75, decided
