"""The paired test: held-out scores against those of the untouched model, document by document.

It gives three bounds. The 95 % bootstrap interval is for people. The decision bound is for acting:
it is one-sided, and `FALSE_ALARM_SHARE` is divided evenly over all domains and all measurements of
the run (Bonferroni), so that at most that share of the runs that lose nothing ever see an action.
The upper bound proves that a loss is tolerable; it is one-sided, too, and holds for one look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from cpt.guard.score import DomainScore, Floats, bits_per_byte
from cpt.guard.yardstick import FALSE_ALARM_SHARE

RESAMPLES = 2000
CONFIDENCE = 0.95
DOCUMENT_SPREAD_PERCENT = 2.0
"""Standard deviation of the change over single documents, assumed before a run to tell what a
held-out set can show. Measured: 1.2 to 2.7 % in five domains whose means had risen by 1.1 to 2.3 %
(bench/prove/guard.py). During the run the spread is that of the scores.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedChange:
    """The change of one domain's bits per byte since step 0."""

    baseline: float
    """Bits per byte of the untouched model on the same documents."""
    delta_percent: float
    """Change of bits per byte; positive is worse."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of `delta_percent`."""
    ci_high: float
    """Upper end of that interval."""
    lower_bound: float
    """Decision bound of `delta_percent`: the loss that is certain. It is never above `ci_low`, and
    NaN if a score is not a number.
    """
    upper_bound: float
    """Bound of `delta_percent` from above, one-sided; infinite if too few documents bear it, NaN if
    a score is not a number.
    """

    @property
    def finite_bound(self) -> float | None:
        """`lower_bound` as JSON can hold it: a finite number, or None for NaN."""
        return None if math.isnan(self.lower_bound) else max(-100.0, self.lower_bound)

    @property
    def finite_upper_bound(self) -> float | None:
        """`upper_bound` as JSON can hold it: a finite number, or None."""
        return self.upper_bound if math.isfinite(self.upper_bound) else None

    @property
    def finite_delta(self) -> float | None:
        """`delta_percent` as JSON can hold it: a finite number, or None for NaN."""
        return self.delta_percent if math.isfinite(self.delta_percent) else None


def compare_scores(
    now: DomainScore,
    baseline: DomainScore,
    num_tests: int = 1,
    *,
    upper_confidence: float = CONFIDENCE,
) -> PairedChange:
    """Compare the scores of two models on the same documents.

    The bootstrap resamples documents, both scores of a document together, with a fixed seed, so
    that the interval can be computed again from the stored scores.

    Args:
        now: Scores of the present weights.
        baseline: Scores of the untouched model.
        num_tests: Domains times measurements of the whole run.
        upper_confidence: Confidence of `upper_bound`.
    """
    assert np.array_equal(now.bytes, baseline.bytes), (
        "scores of different documents cannot be paired"
    )
    count = len(now.nats)
    picks = np.random.Generator(np.random.PCG64(0)).integers(0, count, size=(RESAMPLES, count))
    resampled = 100 * (now.nats[picks].sum(1) / baseline.nats[picks].sum(1) - 1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedChange(
        baseline=bits_per_byte(baseline.nats, baseline.bytes),
        delta_percent=float(100 * (now.nats.sum() / baseline.nats.sum() - 1)),
        ci_low=float(low),
        ci_high=float(high),
        lower_bound=min(float(low), decision_bound(now.nats, baseline.nats, num_tests)),
        upper_bound=upper_bound(now.nats, baseline.nats, 1 - upper_confidence),
    )


def decision_bound(now: Floats, baseline: Floats, num_tests: int) -> float:
    """Return the lower confidence bound, in percent, of the change of a domain.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the untouched model.
        num_tests: How many bounds of the run must hold together.
    """
    estimate, margin = _estimate(now, baseline, FALSE_ALARM_SHARE / max(1, num_tests))
    return estimate - margin


def upper_bound(now: Floats, baseline: Floats, tail: float) -> float:
    """Return the upper confidence bound, in percent, of the change of a domain.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the untouched model.
        tail: Probability that the change is above the bound.
    """
    estimate, margin = _estimate(now, baseline, tail)
    return estimate + margin


def _estimate(now: Floats, baseline: Floats, tail: float) -> tuple[float, float]:
    """Return the change of a domain and its one-sided margin of error, both in percent.

    The estimate is a ratio of sums, so its standard error is that of the residuals `now - ratio *
    baseline` (Cochran, Sampling Techniques, 6.4). The quantile is that of Student's t with as many
    degrees of freedom as equally large documents would give.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the untouched model.
        tail: Probability of a larger error to one side.
    """
    documents = effective_documents(baseline)
    total = baseline.sum()
    ratio = now.sum() / total
    if documents <= 2:
        return float(100 * (ratio - 1)), math.inf
    residuals = now - ratio * baseline
    error = math.sqrt(float((residuals**2).sum()) * documents / (documents - 1)) / total
    quantile = student_quantile(tail, documents - 1)
    return float(100 * (ratio - 1)), float(100 * quantile * error)


def effective_documents(baseline: Floats) -> float:
    """Return how many equally large documents would say as much: (sum n)^2 / sum n^2 (Kish)."""
    return float(baseline.sum() ** 2 / (baseline**2).sum())


def noise_floor_percent(baseline: Floats, num_tests: int) -> float:
    """Return the least change of a domain that could lead to an action, before one was measured.

    Raises:
        ValueError: the documents count as two or fewer, which say nothing.
    """
    documents = effective_documents(baseline)
    if documents <= 2:
        raise ValueError(f"{len(baseline)} documents, of which the largest outweigh the others")
    quantile = student_quantile(FALSE_ALARM_SHARE / max(1, num_tests), documents - 1)
    return quantile * DOCUMENT_SPREAD_PERCENT / math.sqrt(documents)


@lru_cache(maxsize=256)
def student_quantile(tail: float, degrees: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`.

    Cornish-Fisher expansion: Abramowitz and Stegun, 26.7.5.
    """
    z = -NormalDist().inv_cdf(tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
