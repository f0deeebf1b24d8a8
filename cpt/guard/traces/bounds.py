"""Confidence bounds of the mean of values between 0 and a cap, exact for any distribution.

Divergences of traces are never below 0 and lean far to the right, and there are a few hundred of
them: an interval from mean and standard error would promise too much. These bounds come from bets.
Whoever holds that the mean is m lets us bet a share c of our money at fair odds on each value:

    lower, m too small:  E_n(m) = mean_c prod_i [1 + c (x_i - m) / m]
    upper, m too large:  E_n(m) = mean_c prod_i [1 + c (m - x_i) / (cap - m)]

If the mean is m, the expected money is at most 1, so the chance that it reaches 1 / error is at
most `error` (Markov). The bounds are the values of m that are not refuted.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting,
    arXiv 2010.09686, with a mixture over fixed bets in place of their adaptive ones.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from cpt.guard.betting import BISECTIONS, bets_needed, log_growth, log_mean
from cpt.guard.score import Floats

BETS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 0.9, 0.99])
"""(bets,) shares of the money that are bet on each value."""
SPREAD_POINTS = 2000
"""Points at which `values_needed` takes the exponential distribution."""


def lower_bound(values: Floats, error: float) -> float:
    """Return a bound that the mean is below with a chance of at most `error`.

    Args:
        values: (n,) independent values, none below 0; they need no cap.
        error: Largest chance that the bound is above the mean.
    """
    highest = float(values.mean())
    if highest <= 0:
        return 0.0
    lowest = highest * 1e-9
    if not _is_refuted(_bets_on_more(values, lowest), error):
        return 0.0
    for _ in range(BISECTIONS):
        middle = math.sqrt(lowest * highest)
        if _is_refuted(_bets_on_more(values, middle), error):
            lowest = middle
        else:
            highest = middle
    return lowest


def upper_bound(values: Floats, cap: float, error: float) -> float:
    """Return a bound that the mean is above with a chance of at most `error`.

    Args:
        values: (n,) independent values from 0 to `cap`.
        cap: Largest possible value.
        error: Largest chance that the bound is below the mean.
    """
    lowest = float(values.mean())
    highest = cap
    for _ in range(BISECTIONS):
        middle = (lowest + highest) / 2
        if _is_refuted(_bets_on_less(values, middle, cap), error):
            highest = middle
        else:
            lowest = middle
    return highest


def _bets_on_more(values: Floats, mean: float) -> Floats:
    """Return the logarithm of the money (bets,) after betting that the mean is above `mean`."""
    return log_growth(BETS, values / mean - 1)


def _bets_on_less(values: Floats, mean: float, cap: float) -> Floats:
    """Return the logarithm of the money (bets,) after betting that the mean is below `mean`."""
    if mean >= cap:
        return np.full(len(BETS), math.inf)
    return log_growth(BETS, (mean - values) / (cap - mean))


def _is_refuted(log_money: Floats, error: float) -> bool:
    """Return whether the mean of the money over all bets is at least 1 / `error`."""
    return log_mean(log_money) >= -math.log(error)


@lru_cache(maxsize=64)
def values_needed(mean: float, line: float, cap: float, error: float) -> int:
    """Return how many values put a bound on the right side of a line in 90 % of cases.

    The values are taken to spread as those of an exponential distribution, whose standard
    deviation is its mean, cut at `cap`. The logarithm of the money is taken to be normal.

    Args:
        mean: Mean of the values before the cut. Below the line, the upper bound has to come below
            it; above the line, the lower bound above it.
        line: The line.
        cap: Largest value.
        error: Error of the bound.
    """
    shares = (np.arange(SPREAD_POINTS) + 0.5) / SPREAD_POINTS
    values = np.minimum(-mean * np.log1p(-shares), cap)
    gains = values / line - 1
    if mean < line:
        gains = (line - values) / (cap - line)
    growth = np.log1p(BETS[:, None] * gains[None, :])
    # one bet alone must make up for all that lose
    target = math.log(len(BETS) / error)
    needed = math.inf
    for mean_growth, spread in zip(growth.mean(1), growth.std(1), strict=True):
        if mean_growth > 0:
            needed = min(needed, bets_needed(mean_growth, spread, target))
    return math.ceil(needed)
