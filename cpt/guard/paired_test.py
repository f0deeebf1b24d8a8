"""The paired test: held-out scores against those of the untouched model, document by document.

It estimates the change of a domain with two bounds. The 95 % interval is for people. The upper
bound is one-sided and proves that a loss is tolerable. Whether a loss is proven is told by bets
(cpt/guard/betting.py), which need no normal distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpt.guard.score import DomainScore, Floats, bits_per_byte
from cpt.guard.student import student_quantile
from data_pipeline.store.packing import Integers

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedChange:
    """The change of one domain's bits per byte since step 0."""

    baseline: float
    """Bits per byte of the untouched model on the same documents."""
    delta_percent: float
    """Change of bits per byte; positive is worse."""
    ci_low: float
    """Lower end of the 95 % interval of `delta_percent`."""
    ci_high: float
    """Upper end of that interval."""
    upper_bound: float
    """Bound of `delta_percent` from above, one-sided; infinite if too few documents bear it, NaN if
    a score is not a number.
    """


def compare_scores(
    now: DomainScore,
    baseline: DomainScore,
    *,
    clusters: Integers | None = None,
    upper_confidence: float = CONFIDENCE,
) -> PairedChange:
    """Compare the scores of two models on the same documents.

    The interval is the wider of two: of a bootstrap, which resamples documents, both scores of a
    document together, with a fixed seed, so that it can be computed again from the stored scores;
    and of Student's t, because the bootstrap of few documents is too narrow (of 6, nominal 95 %
    cover 82 %).

    Args:
        now: Scores of the present weights.
        baseline: Scores of the untouched model.
        clusters: (documents,) cluster of each document; None if each is one of its own.
        upper_confidence: Confidence of `upper_bound`.
    """
    assert np.array_equal(now.bytes, baseline.bytes), (
        "scores of different documents cannot be paired"
    )
    now_nats = cluster_sums(now.nats, clusters)
    nats = cluster_sums(baseline.nats, clusters)
    picks = resamples(len(nats))
    resampled = 100 * (now_nats[picks].sum(1) / nats[picks].sum(1) - 1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    delta = float(100 * (now_nats.sum() / nats.sum() - 1))
    margin = margin_of_error(now_nats, nats, (1 - CONFIDENCE) / 2)
    if not math.isfinite(margin):
        margin = 0.0
    return PairedChange(
        baseline=bits_per_byte(baseline.nats, baseline.bytes),
        delta_percent=delta,
        ci_low=float(min(low, delta - margin)),
        ci_high=float(max(high, delta + margin)),
        upper_bound=delta + margin_of_error(now_nats, nats, 1 - upper_confidence),
    )


def resamples(count: int) -> Integers:
    """Return (RESAMPLES, count) numbers of documents, drawn with replacement by a fixed seed."""
    generator = np.random.Generator(np.random.PCG64(0))
    return generator.integers(0, count, size=(RESAMPLES, count))


def cluster_sums(values: Floats, clusters: Integers | None) -> Floats:
    """Return the sums of values over clusters; the values themselves without clusters."""
    if clusters is None:
        return values
    _, numbers = np.unique(clusters, return_inverse=True)
    return np.bincount(numbers, weights=values).astype(np.float64)


def margin_of_error(now: Floats, baseline: Floats, tail: float) -> float:
    """Return the one-sided margin of error of the change of a domain, in percent.

    The estimate is a ratio of sums, so its standard error is that of the residuals `now - ratio *
    baseline` (Cochran, Sampling Techniques, 6.4). The quantile is that of Student's t with as many
    degrees of freedom as equally large documents would give.

    Args:
        now: (documents,) nats of the present weights, or their sums over clusters.
        baseline: (documents,) nats of the untouched model, likewise.
        tail: Probability of a larger error to one side.

    Returns:
        The margin; infinite if the documents count as two or fewer.
    """
    documents = effective_documents(baseline)
    if documents <= 2:
        return math.inf
    total = baseline.sum()
    residuals = now - now.sum() / total * baseline
    error = math.sqrt(float((residuals**2).sum()) * documents / (documents - 1)) / total
    return float(100 * student_quantile(tail, documents - 1) * error)


def effective_documents(baseline: Floats) -> float:
    """Return how many equally large documents would say as much: (sum n)^2 / sum n^2 (Kish)."""
    return float(baseline.sum() ** 2 / (baseline**2).sum())
