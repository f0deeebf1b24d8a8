"""Bounds that hold for documents of any shape: bets on the mean of their changes.

Let X be the change of one document in percent, never below -`LARGEST_GAIN`, and l a line. Under
the hypothesis that the mean of X is at most l, a gambler who starts with 1 and stakes the part
lambda of his wealth on every document,

    E = prod_i [1 + lambda (X_i - l) / (LARGEST_GAIN + l)],   0 < lambda < 1,

cannot expect to win, whatever the distribution: E has an expectation of at most 1, so it exceeds
1 / alpha with a probability of at most alpha (Markov; Waudby-Smith and Ramdas, arXiv 2010.09686).
No normal distribution and no spread is assumed, so skew cannot break the bound. The mean over
several lambda is such a wealth, too.

Two bounds follow.

    One panel, measured again and again: the wealth of one look against looks x domains / alpha.
    Fresh documents at every look: R_t = (R_{t-1} + 1) E_t, the Shiryaev-Roberts statistic as an
    e-detector (Shin, Ramdas and Rinaldo, arXiv 2203.03532). Its expectation after t looks is at
    most t, so the same threshold holds at any look, and evidence adds up over looks. It forgets a
    loss that is over, because R falls while bets are lost.

A document whose bits per byte fall by more than `LARGEST_GAIN` counts as that much; such gains are
those of copies in the training text. The bounds are of the mean over documents, each of which
counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt.guard.score import Floats

LARGEST_GAIN = 20.0
"""Percent; see the module."""
STAKES = np.array([0.03, 0.1, 0.2, 0.4, 0.65, 0.9])
"""(lambdas,) parts of the wealth that are staked: small ones find small losses in many documents,
large ones large losses in few."""
BISECTIONS = 40
"""Halvings of the interval in which a bound lies."""
POWER_QUANTILE = 1.2816
"""Standard normal quantile of the power that numbers of documents are chosen for: 90 %."""
MOST_DOCUMENTS = 10**9
"""More documents than can be held out: numbers that are larger, or infinite, count as this."""
STATE_DIGITS = 6
"""Decimal digits that are kept of a logarithm of wealth."""


def percent_changes(now: Floats, baseline: Floats) -> Floats:
    """Return the changes of documents in percent, as bets are placed on them.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the untouched model.
    """
    says_something = baseline > 0  # a document without a single nat has nothing to lose
    changes = np.zeros(len(now))
    np.divide(now, baseline, out=changes, where=says_something)
    return np.where(says_something, np.maximum(100 * (changes - 1), -LARGEST_GAIN), 0.0)


def log_wealth(changes: Floats, line: float) -> Floats:
    """Return the logarithm of the wealth after bets that the mean change is above a line.

    Args:
        changes: (documents,) changes in percent.
        line: The line in percent, above -LARGEST_GAIN.

    Returns:
        (lambdas,) one value for each stake.
    """
    return log_growth(STAKES, (changes - line) / (LARGEST_GAIN + line))


def log_growth(stakes: Floats, gains: Floats) -> Floats:
    """Return the logarithm of the wealth after a sequence of bets.

    Args:
        stakes: (stakes,) parts of the wealth that are staked on every bet.
        gains: (bets,) gain of each bet for every unit that is staked.

    Returns:
        (stakes,) one value for each stake.
    """
    growth: Floats = np.log1p(stakes[:, None] * gains).sum(1)
    return growth


def log_mean(log_values: Floats) -> float:
    """Return the logarithm of the mean of values whose logarithms are given."""
    largest = float(log_values.max())
    if math.isinf(largest):
        return largest
    return largest + math.log(float(np.exp(log_values - largest).mean()))


def lower_bound(changes: Floats, threshold: float) -> float:
    """Return the largest line that the mean change is certainly above, in percent.

    Args:
        changes: (documents,) changes in percent.
        threshold: Wealth from which on a bet counts as won: 1 / alpha, times the number of bounds
            that must hold together.

    Returns:
        The bound; NaN if a change is not a finite number.
    """
    if not np.isfinite(changes).all():
        return math.nan
    low = -LARGEST_GAIN  # every line down there is beaten, or no document says anything
    high = float(changes.max())
    if high <= low:  # every document has gained all that counts
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if log_mean(log_wealth(changes, middle)) >= math.log(threshold):
            low = middle
        else:
            high = middle
    return low


class Detector:
    """The Shiryaev-Roberts statistics of one domain, one for each of several lines."""

    def __init__(self, lines: Sequence[float], state: dict[str, Any] | None = None) -> None:
        """Begin, or go on from a state.

        Args:
            lines: Lines in percent.
            state: The output of `to_json`; a line that it does not know begins anew.
        """
        self._log_sums: dict[float, Floats] = {}
        for line in sorted(set(lines)):
            stored = (state or {}).get(repr(float(line)))
            if stored is None:
                stored = [0.0] * len(STAKES)
            self._log_sums[line] = np.asarray(stored, dtype=np.float64)

    def add(self, changes: Floats, threshold: float) -> float:
        """Place the bets of one look.

        Args:
            changes: (documents,) changes in percent of documents that no look has seen before.
            threshold: See `cpt.guard.yardstick.Look.alarm_threshold`.

        Returns:
            The largest line that alarms; -LARGEST_GAIN if none does, NaN if a change is not a
            finite number. Then the bets are off.
        """
        if not np.isfinite(changes).all():
            return math.nan
        bound = -LARGEST_GAIN
        for line, log_sum in self._log_sums.items():
            log_r = log_sum + log_wealth(changes, line)
            if log_mean(log_r) >= math.log(threshold):
                bound = max(bound, line)
            log_sum = np.logaddexp(log_r, 0.0).astype(np.float64)
            self._log_sums[line] = np.round(log_sum, STATE_DIGITS)
        return bound

    def to_json(self) -> dict[str, list[float]]:
        """Return log(R + 1) of every stake, by line."""
        return {repr(float(line)): sums.tolist() for line, sums in self._log_sums.items()}


def documents_needed(line: float, loss: float, spread: float, threshold: float) -> int:
    """Return how many documents show a loss with a probability of 90 %.

    The logarithm of the wealth of a stake grows by log(1 + f d) - (f s / (1 + f d))^2 / 2 a
    document on average, with a standard deviation of f s / (1 + f d), for the stake f = lambda /
    (LARGEST_GAIN + line), the distance d of the loss from the line, and the spread s.

    Args:
        line: The line in percent.
        loss: Mean change in percent, above the line.
        spread: Standard deviation over documents, in percent.
        threshold: See `lower_bound`.

    Returns:
        The number; `MOST_DOCUMENTS` if no stake grows, because the loss is too near to the line.
    """
    needed = float(MOST_DOCUMENTS)
    goal = math.log(threshold) + math.log(len(STAKES))  # one stake alone has to reach it
    for stake in STAKES / (LARGEST_GAIN + line):
        gain = 1 + stake * (loss - line)
        deviation = stake * spread / gain
        growth = math.log(gain) - deviation**2 / 2
        if growth <= 0:
            continue
        needed = min(needed, bets_needed(growth, deviation, goal))
    return math.ceil(needed)


def bets_needed(growth: float, deviation: float, goal: float) -> float:
    """Return how many bets make the logarithm of the wealth reach a goal in 90 % of cases.

    The sum of n bets is taken to be normal: n growth - POWER_QUANTILE deviation sqrt(n) = goal,
    solved for n.

    Args:
        growth: Mean growth of the logarithm by one bet, above 0.
        deviation: Standard deviation of that growth.
        goal: Logarithm that is to be reached.
    """
    margin = POWER_QUANTILE * deviation
    root = (margin + math.sqrt(margin**2 + 4 * growth * goal)) / (2 * growth)
    return root**2
