"""Replies of the model against those of the untouched model to the same prompts: bounds and states.

    (before, now) of each prompt -> Outcomes -> bounds on the loss -> state

Two quantities are judged, each in percentage points of the prompts asked:

    format     The share of replies that were in good form and no longer are. What was won does not
               count against what was lost: nobody pays with one broken reply for another.
    accuracy   The share of right answers before less the share now.

Decisions
    Bounds of one look are exact, for any number of prompts: Clopper and Pearson's bounds on the
    share of lost replies among those that passed before, and of won ones among those that did not.
    How many passed before is known, so where all did, nothing can be won. Greedy replies of the
    same model are equal, so most pairs agree and the bounds are narrow where it matters.
    A small loss that stays needs more than one look to be proven. A betting process adds up what
    fresh prompts say (Waudby-Smith and Ramdas, arXiv 2010.09686), as a Shiryaev-Roberts statistic
    (arXiv 2203.03532): with x = lost - won of a prompt, a the least value that x can have, and l
    the line from which on a loss counts, both as shares,

        E_t(b) = prod (1 + b (x - l) / (l - a)),    R_t(b) = (R_{t-1}(b) + 1) E_t(b),

    for each bet b in BETS. Without a loss above l, the mean of R_t over the bets is expected to be
    at most t, at any look. Prompts that are asked again, because the file has no fresh ones left,
    begin a process of their own: they would say the same thing twice.
    Half of the false alarms that are allowed belong to the bound of a look, half to the process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from cpt.guard.yardstick import GREEN_ERROR

Measure = Literal["format", "accuracy"]
BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.9)
"""Shares of the wealth that are bet on a loss."""
LOST_PART = 0.8
"""Part of an error that the bound on the lost replies gets; the won ones get the rest. The lost
ones decide, and won ones only help.
"""
POWER = 0.9
"""Probability with which a model that has lost nothing must be found green."""
HARMLESS_SHARE = {"format": 0.001, "accuracy": 0.02}
"""Share of the replies that are lost, and for accuracy as many that are won, by a model that has
lost nothing: the churn that sample sizes allow for. A choice, not a measurement.
"""
PASSED_SHARE = {"format": 1.0, "accuracy": 0.8}
"""Share of the untouched model's replies that pass, for sample sizes: a choice, too."""
LEAST_PROBABILITY = 1e-6
"""Probability of a count below which it is left out of the power."""
MOST_PROMPTS = 100_000
"""Prompts beyond which no sample size is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """One measure of the replies to some prompts, before and now."""

    num_prompts: int
    """Prompts with this measure."""
    num_before: int
    """Replies of the untouched model that pass it."""
    num_now: int
    """Replies of the model that pass it."""
    lost: int
    """Prompts whose reply passed it before, and does not now."""
    won: int
    """Prompts whose reply did not pass it before, and does now."""

    @classmethod
    def of(cls, before: Sequence[bool], now: Sequence[bool]) -> Outcomes:
        """Count the outcomes of prompts.

        Args:
            before: Whether the reply of the untouched model passes, by prompt.
            now: Whether the reply of the model passes.
        """
        pairs = list(zip(before, now, strict=True))
        return cls(
            num_prompts=len(pairs),
            num_before=sum(before),
            num_now=sum(now),
            lost=sum(was and not passes for was, passes in pairs),
            won=sum(passes and not was for was, passes in pairs),
        )

    def loss_points(self, measure: Measure) -> float:
        """Return the estimate of the loss in percentage points; 0 without prompts."""
        net = self.lost if measure == "format" else self.lost - self.won
        return 100 * net / max(1, self.num_prompts)

    def upper_points(self, measure: Measure, error: float) -> float:
        """Return a bound that the loss in points is below, but for a probability of `error`."""
        num_failed = self.num_prompts - self.num_before
        if measure == "format":
            most_lost = self.num_before * share_below(self.lost, self.num_before, error)
            return 100 * most_lost / max(1, self.num_prompts)
        most_lost = self.num_before * share_below(self.lost, self.num_before, LOST_PART * error)
        least_won = num_failed * share_above(self.won, num_failed, (1 - LOST_PART) * error)
        return 100 * (most_lost - least_won) / max(1, self.num_prompts)

    def lower_points(self, measure: Measure, error: float) -> float:
        """Return a bound that the loss in points is above, but for a probability of `error`."""
        num_failed = self.num_prompts - self.num_before
        if measure == "format":
            least_lost = self.num_before * share_above(self.lost, self.num_before, error)
            return 100 * least_lost / max(1, self.num_prompts)
        least_lost = self.num_before * share_above(self.lost, self.num_before, LOST_PART * error)
        most_won = num_failed * share_below(self.won, num_failed, (1 - LOST_PART) * error)
        return 100 * (least_lost - most_won) / max(1, self.num_prompts)


def bet(
    statistic: Sequence[float], outcomes: Outcomes, measure: Measure, line: float
) -> list[float]:
    """Return the Shiryaev-Roberts statistic of each bet after the fresh prompts of one look.

    Args:
        statistic: The statistics before; empty at the start.
        outcomes: Outcomes of prompts that the process has not seen.
        measure: The measure.
        line: Loss in percentage points from which on it counts.
    """
    share = line / 100
    counts = [(1, outcomes.lost), (0, outcomes.num_prompts - outcomes.lost)]
    least = 0
    if measure == "accuracy":
        counts[1] = (0, outcomes.num_prompts - outcomes.lost - outcomes.won)
        counts.append((-1, outcomes.won))
        least = -1
    after = []
    for size, before in zip(BETS, statistic or [0.0] * len(BETS), strict=True):
        log_factor = 0.0
        for change, count in counts:
            log_factor += count * math.log1p(size * (change - share) / (share - least))
        # beyond e^300 every threshold is far behind, and the next products must stay finite
        after.append(min((before + 1) * math.exp(min(log_factor, 300.0)), 1e200))
    return after


@lru_cache(maxsize=4096)
def share_below(count: int, trials: int, error: float) -> float:
    """Return Clopper and Pearson's upper bound on the share behind `count` of `trials`."""
    if count >= trials:  # without trials the share can be anything
        return 1.0
    low = count / trials
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(count, trials, middle) > error:
            low = middle
        else:
            high = middle
    return high


def share_above(count: int, trials: int, error: float) -> float:
    """Return Clopper and Pearson's lower bound on the share behind `count` of `trials`."""
    return 1 - share_below(trials - count, trials, error)


def _at_most(count: int, trials: int, share: float) -> float:
    """Return the probability of at most `count` successes, each with probability `share`."""
    return float(_probabilities(trials, share)[: count + 1].sum())


@lru_cache(maxsize=8)
def _log_choices(trials: int) -> npt.NDArray[np.float64]:
    """Return the logarithms of the binomial coefficients of `trials`."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    return factorials[-1] - factorials - factorials[::-1]


def _probabilities(trials: int, share: float) -> npt.NDArray[np.float64]:
    """Return the probabilities of 0 to `trials` successes."""
    successes = np.arange(trials + 1)
    if share <= 0 or share >= 1:
        return (successes == (trials if share >= 1 else 0)).astype(np.float64)
    logs = successes * math.log(share) + (trials - successes) * math.log1p(-share)
    return np.exp(_log_choices(trials) + logs)


def green_power(measure: Measure, num_prompts: int, tolerance: float) -> float:
    """Return how probably a model that has lost nothing is found green at one look.

    Its replies are lost and won as HARMLESS_SHARE says.

    Args:
        measure: The measure.
        num_prompts: Prompts asked.
        tolerance: Tolerated loss in percentage points.
    """
    churn = HARMLESS_SHARE[measure]
    num_before = round(PASSED_SHARE[measure] * num_prompts)
    num_failed = num_prompts - num_before
    counts_won = [0]
    won_probabilities = np.ones(1)
    if num_failed:
        won_probabilities = _probabilities(num_failed, min(1.0, churn * num_prompts / num_failed))
        counts_won = np.flatnonzero(won_probabilities > LEAST_PROBABILITY).tolist()
    lost_probabilities = _probabilities(num_before, min(1.0, churn * num_prompts / num_before))
    power = 0.0
    for lost in np.flatnonzero(lost_probabilities > LEAST_PROBABILITY).tolist():
        for won in counts_won:
            outcomes = Outcomes(
                num_prompts=num_prompts,
                num_before=num_before,
                num_now=num_before - lost + won,
                lost=lost,
                won=won,
            )
            if outcomes.upper_points(measure, GREEN_ERROR) < tolerance:
                power += float(lost_probabilities[lost] * won_probabilities[won])
    return power


@lru_cache(maxsize=64)
def prompts_needed(measure: Measure, tolerance: float) -> int:
    """Return about how many prompts it takes to find a model green that has lost nothing."""
    enough = 2
    while green_power(measure, enough, tolerance) < POWER:
        enough *= 2
        if enough > MOST_PROMPTS:
            return enough
    low = enough // 2
    while enough - low > max(1, enough // 50):
        middle = (low + enough) // 2
        if green_power(measure, middle, tolerance) >= POWER:
            enough = middle
        else:
            low = middle
    return enough
