"""Held-out scores against those of the untouched model, paired document by document.

Two bounds are computed.  The 95 % bootstrap interval is for people.  The decision bound is for
acting: it is one-sided, and its confidence is what is left of `FALSE_ALARM_SHARE` when that is
    divided evenly over all domains and all
measurements of the run (Bonferroni), so that a run that loses nothing sees an action in at most
that share of cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from cpt.guard.score import DomainScore, Floats, bits_per_byte

RESAMPLES = 2000
CONFIDENCE = 0.95
FALSE_ALARM_SHARE = 0.01
"""Runs that lose nothing and yet see an action."""
DOCUMENT_SPREAD_PERCENT = 2.0
"""Standard deviation of the change of single documents while their mean is near 1 %: 1.2 to 2.7
where the means of five domains were 1.1 to 2.3 % (bench/prove/guard.py).  It tells before the run
what a held-out set can show; during the run the spread is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One domain at one step, against step 0."""

    baseline: float
    """Bits per byte of the untouched model on the same documents."""
    delta_percent: float
    """Change of bits per byte; positive is worse."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of `delta_percent`."""
    ci_high: float
    """Upper end."""
    lower_bound: float
    """Decision bound of `delta_percent`: what is surely lost.  Never above `ci_low`; NaN if a score
    is not a number.
    """

    @property
    def decided_on(self) -> float | None:
        """`lower_bound` as JSON can hold it, and as the ladder takes it: finite, or None for what
        is not a number.
        """
        return None if math.isnan(self.lower_bound) else max(-100.0, self.lower_bound)


def judge(now: DomainScore, baseline: DomainScore, num_tests: int = 1) -> Judgement:
    """Compare paired scores.

    The bootstrap resamples documents (both scores of a document together) with a fixed seed, so
    that it can be computed again from the stored scores.

    Args:
        now: Scores of the present weights.
        baseline: Scores of the untouched model on the same documents.
        num_tests: Domains times measurements of the whole run.
    """
    assert np.array_equal(now.bytes, baseline.bytes), (
        "scores of different documents cannot be paired"
    )
    count = len(now.nats)
    picks = np.random.Generator(np.random.PCG64(0)).integers(0, count, size=(RESAMPLES, count))
    resampled = 100 * (now.nats[picks].sum(1) / baseline.nats[picks].sum(1) - 1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Judgement(
        baseline=bits_per_byte(baseline.nats, baseline.bytes),
        delta_percent=float(100 * (now.nats.sum() / baseline.nats.sum() - 1)),
        ci_low=float(low),
        ci_high=float(high),
        lower_bound=min(float(low), decision_bound(now.nats, baseline.nats, num_tests)),
    )


def decision_bound(now: Floats, baseline: Floats, num_tests: int) -> float:
    """Lower confidence bound, in percent, of the change of a domain.

    The estimate is a ratio of sums, so its standard error is that of the residuals `now - ratio *
    baseline` (Cochran, Sampling Techniques, 6.4); Student's t with as many degrees of freedom as
    equally large documents would give.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the untouched model.
        num_tests: How many bounds of the run must hold together.
    """
    total, ratio = baseline.sum(), now.sum() / baseline.sum()
    documents = effective_documents(baseline)
    if documents <= 2:
        return -math.inf
    residuals = now - ratio * baseline
    error = math.sqrt(float((residuals**2).sum()) * documents / (documents - 1)) / total
    return float(
        100
        * (
            ratio
            - 1
            - student_quantile(FALSE_ALARM_SHARE / max(1, num_tests), documents - 1) * error
        )
    )


def effective_documents(baseline: Floats) -> float:
    """How many equally large documents would say as much (Kish): (sum n)^2 / sum n^2."""
    return float(baseline.sum() ** 2 / (baseline**2).sum())


def noise_floor_percent(baseline: Floats, num_tests: int) -> float:
    """The least change of a domain that could lead to an action, before any was measured.

    Raises:
        ValueError: fewer than three documents say nothing.
    """
    documents = effective_documents(baseline)
    if documents <= 2:
        raise ValueError(f"{len(baseline)} documents, of which the largest outweigh the others")
    quantile = student_quantile(FALSE_ALARM_SHARE / max(1, num_tests), documents - 1)
    return quantile * DOCUMENT_SPREAD_PERCENT / math.sqrt(documents)


@lru_cache(maxsize=256)
def student_quantile(tail: float, degrees: float) -> float:
    """What Student's t exceeds with probability `tail`; Cornish-Fisher expansion (Abramowitz and
    Stegun, 26.7.5).
    """
    z = -NormalDist().inv_cdf(tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
