"""How sure a drop is, and how many items it takes to see one: tests, bounds and power.

Paired right and wrong answers (the two models answer the same items)
    `lost` items went from right to wrong, `won` ones from wrong to right; the others say nothing.
    Whether there is a drop: the one-sided mid-p McNemar test (Fagerland, Lydersen and Laake 2013,
    BMC Medical Research Methodology 13:91). How large it may be: the score bound of Tango (1998,
    Statistics in Medicine 17:891), with a continuity correction, since without one it errs more
    often than it says where few answers changed.
Paired values (shares of repeated attempts, marks of a judge, nats)
    Student's t on the differences, and where all are equal, the bound of answers of which none
    changed; nats are compared as a ratio of sums (Cochran, Sampling Techniques, 6.4).
Shares of right answers without items
    The bound of Agresti and Caffo (2000, The American Statistician 54:280) for two proportions.

All shares are between 0 and 1 here, and a drop is positive if the later model is worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WANTED_POWER = 0.8
"""Least probability with which an evaluation must see the drop that it is meant to see."""
ASSUMED_CHURN = 0.1
"""Share of the answers that change without a drop, half of them each way; assumed before it is
measured.
"""
ROUNDING = 1e-9
"""Values that differ by less than this are equal."""
_NORMAL = NormalDist()
_MAX_ITEMS = 10_000_000
"""Where the search for a sufficient number of items ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a comparison shows: how far a score dropped, and how sure that is."""

    drop: float
    """Estimated drop: a share between -1 and 1, or a relative rise of nats."""
    stderr: float
    """Standard error of `drop`."""
    upper_bound: float
    """One-sided upper bound of the drop at the confidence asked for."""
    proven: bool
    """Whether a drop above 0 is proven at the significance level asked for."""
    lost: int | None = None
    """Items that went from right to wrong; None if items are not known as right or wrong."""
    won: int | None = None
    """Items that went from wrong to right; None like `lost`."""
    p_value: float | None = None
    """One-sided mid-p value of McNemar's test; None like `lost`."""


def compare_answers(before: Floats, after: Floats, confidence: float, level: float) -> Change:
    """Compare right (1) and wrong (0) answers of two models on the same items.

    Args:
        before: (items,) answers of the model before training.
        after: (items,) answers of the model after training, in the same order.
        confidence: Of the upper bound, such as 0.95.
        level: Significance level of the test, such as 0.01.
    """
    lost = int(((before == 1) & (after == 0)).sum())
    won = int(((before == 0) & (after == 1)).sum())
    count = len(before)
    p_value = mcnemar_p_value(lost, won)
    # one item more of each kind, so that no change at all does not count as certainty
    # (Bonett and Price 2012)
    churn = (lost + won + 2) / (count + 2)
    shift = (lost - won) / (count + 2)
    return Change(
        drop=(lost - won) / count,
        stderr=math.sqrt((churn - shift**2) / (count + 2)),
        upper_bound=largest_drop(lost, won, count, confidence),
        proven=p_value <= level,
        lost=lost,
        won=won,
        p_value=p_value,
    )


def compare_values(before: Floats, after: Floats, confidence: float, level: float) -> Change:
    """Compare values of two models on the same items; a larger value is better.

    Args:
        before: (items,) values of the model before training, between 0 and 1.
        after: (items,) values of the model after training, in the same order.
        confidence: Of the upper bound.
        level: Significance level of the test.
    """
    differences = before - after
    count = len(differences)
    drop = float(differences.mean())
    stderr = math.inf
    if count > 1:
        if float(np.ptp(differences)) < ROUNDING:
            return _change_without_spread(drop, count, confidence, level)
        stderr = float(differences.std(ddof=1)) / math.sqrt(count)
    return _student_change(drop, stderr, count, confidence, level)


def _change_without_spread(drop: float, count: int, confidence: float, level: float) -> Change:
    """Return the change of values that all changed alike, which does not make it certain.

    Items that were not asked may have changed otherwise: as many as answers may have of which none
    did (`compare_answers`).
    """
    return Change(
        drop=drop,
        stderr=math.sqrt(2) / (count + 2),
        upper_bound=min(1.0, drop + largest_drop(0, 0, count, confidence)),
        proven=drop - largest_drop(0, 0, count, 1 - level) > 0,
    )


def compare_nats(before: Floats, after: Floats, confidence: float, level: float) -> Change:
    """Compare the nats of two models on the same texts; `drop` is the relative rise of their sum.

    Args:
        before: (texts,) nats of the model before training.
        after: (texts,) nats of the model after training, in the same order.
        confidence: Of the upper bound.
        level: Significance level of the test.
    """
    total = float(before.sum())
    ratio = float(after.sum()) / total
    count = len(before)
    stderr = math.inf
    if count > 1:
        spread = float(np.var(after - ratio * before, ddof=1))
        stderr = math.sqrt(count * spread) / total
    return _student_change(ratio - 1, stderr, count, confidence, level)


def compare_shares(
    before: float, after: float, items: tuple[int, int], confidence: float, level: float
) -> Change:
    """Compare two shares of right answers whose items are not known one by one.

    Args:
        before: Share of the model before training.
        after: Share of the model after training.
        items: Number of items of each.
        confidence: Of the upper bound.
        level: Significance level of the test.
    """
    shares = []
    variance = 0.0
    for share, count in zip((before, after), items, strict=True):
        adjusted = (share * count + 1) / (count + 2)
        variance += adjusted * (1 - adjusted) / (count + 2)
        shares.append(adjusted)
    stderr = math.sqrt(variance)
    shift = shares[0] - shares[1]
    return Change(
        drop=before - after,
        stderr=stderr,
        upper_bound=min(1.0, shift + _NORMAL.inv_cdf(confidence) * stderr),
        proven=shift - _NORMAL.inv_cdf(1 - level) * stderr > 0,
    )


def _student_change(
    drop: float, stderr: float, count: int, confidence: float, level: float
) -> Change:
    """Return the change of a mean whose error has `count` - 1 degrees of freedom."""
    # the guard loads torch, which most comparisons do not need
    from cpt.guard.student import student_quantile

    if math.isinf(stderr):
        return Change(drop=drop, stderr=stderr, upper_bound=math.inf, proven=False)
    upper_bound = drop + student_quantile(1 - confidence, count - 1) * stderr
    certain = drop - student_quantile(level, count - 1) * stderr
    return Change(drop=drop, stderr=stderr, upper_bound=upper_bound, proven=certain > 0)


@lru_cache(maxsize=8)
def _log_factorials(largest: int) -> Floats:
    """Return (largest + 1,) log(n!) for n = 0 ... largest."""
    logs = np.log(np.arange(1, largest + 1, dtype=np.float64))
    return np.concatenate([[0.0], np.cumsum(logs)])


def _binomial(count: int, share: float) -> Floats:
    """Return (count + 1,) probabilities of 0 ... count successes in `count` trials."""
    if share >= 1:
        certain = np.zeros(count + 1)
        certain[-1] = 1
        return certain
    logs = _log_factorials(count)
    successes = np.arange(count + 1)
    choose = logs[count] - logs - logs[::-1]
    log_odds = successes * math.log(share) + (count - successes) * math.log1p(-share)
    return np.asarray(np.exp(choose + log_odds))


def _upper_tails(probabilities: Floats) -> Floats:
    """Return P(X > k) for k = 0, 1, ... from P(X = k)."""
    return np.asarray(np.cumsum(probabilities[::-1])[::-1] - probabilities)


def _mid_p_values(discordant: int) -> Floats:
    """Return (discordant + 1,) mid-p values by the number of lost items."""
    probabilities = _binomial(discordant, 0.5)
    return np.asarray(_upper_tails(probabilities) + probabilities / 2)


def mcnemar_p_value(lost: int, won: int) -> float:
    """Return the one-sided mid-p value: P(more than `lost`) + P(exactly `lost`) / 2.

    If there is no drop, an item whose answer changed was lost or won with equal probability.
    """
    return float(_mid_p_values(lost + won)[lost])


def largest_drop(lost: int, won: int, count: int, confidence: float) -> float:
    """Return the upper bound of the drop that `lost` and `won` of `count` paired items allow.

    It is the drop d at which the score statistic (lost - won + 1/2 - n d) / sqrt(n (2 q + d - d^2))
    reaches minus the normal quantile; q is the most likely share of won items if the drop is d.
    """
    quantile = _NORMAL.inv_cdf(confidence)
    low = max((lost - won) / count, -1.0)
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        variance = count * _variance_of_an_item(lost, won, count, middle)
        distance = lost - won + 0.5 - count * middle
        # the squares have no division by a variance of 0
        excluded = distance < 0 and distance**2 > quantile**2 * variance
        if excluded:
            high = middle
        else:
            low = middle
    return high


def _variance_of_an_item(lost: int, won: int, count: int, drop: float) -> float:
    """Return 2 q + d - d^2 at the most likely q for a drop d (Tango 1998, equation 6)."""
    linear = -lost - won + (2 * count - lost + won) * drop
    constant = -won * drop * (1 - drop)
    root = math.sqrt(max(0.0, linear**2 - 8 * count * constant))
    won_share = (root - linear) / (4 * count)
    return max(0.0, 2 * won_share + drop * (1 - drop))


def power_of_answers(count: int, drop: float, churn: float, level: float) -> float:
    """Return the probability that McNemar's test proves a true drop with so many paired items.

    Args:
        count: Number of items.
        drop: True drop, above 0.
        churn: Share of the items whose answer would change without a drop, half of them each way.
        level: Significance level of the test.
    """
    changed_share = min(1.0, drop + churn)
    lost_share = min(1.0, (drop + churn / 2) / changed_share)
    changed_items = _binomial(count, changed_share)
    power = 0.0
    # numbers of changed answers with less weight than this add nothing
    for changed in np.flatnonzero(changed_items > 1e-12):
        significant = _mid_p_values(int(changed)) <= level
        lost = _binomial(int(changed), lost_share)
        power += float(changed_items[changed] * lost[significant].sum())
    return power


def items_for_answers(drop: float, churn: float, level: float) -> int:
    """Return about how many paired items prove a true drop with `WANTED_POWER`.

    The start is the normal approximation (Connor 1987, Biometrics 43:207).
    """
    changed_share = min(1.0, drop + churn)
    spread_without = math.sqrt(changed_share)
    spread_with = math.sqrt(max(0.0, changed_share - drop**2))
    distance = _NORMAL.inv_cdf(1 - level) * spread_without
    distance += _NORMAL.inv_cdf(WANTED_POWER) * spread_with
    count = max(1, math.ceil((distance / drop) ** 2))
    while count < _MAX_ITEMS and power_of_answers(count, drop, churn, level) < WANTED_POWER:
        count = math.ceil(1.05 * count)
    return count


def power_of_mean(drop: float, stderr: float, level: float) -> float:
    """Return the probability that a normal estimate with this error proves a true drop."""
    if stderr == 0:
        return 1.0
    return _NORMAL.cdf(drop / stderr - _NORMAL.inv_cdf(1 - level))


def items_for_mean(drop: float, stderr: float, count: int, level: float) -> int:
    """Return about how many items prove a true drop, if `count` items have this error."""
    quantiles = _NORMAL.inv_cdf(1 - level) + _NORMAL.inv_cdf(WANTED_POWER)
    return math.ceil(count * (quantiles * stderr / drop) ** 2)
