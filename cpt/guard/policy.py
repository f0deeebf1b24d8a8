"""Held-out scores against those of the untouched model, paired document by document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpt.guard.score import DomainScore, bits_per_byte

RESAMPLES = 2000
CONFIDENCE = 0.95


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
    action: str
    """`none`, or `warn` when the whole interval is above the tolerance, or a score is not a number."""


def judge(now: DomainScore, baseline: DomainScore, tolerance_percent: float) -> Judgement:
    """Compare paired scores; only the interval, never the mean alone, leads to an action.

    The bootstrap resamples documents (both scores of a document together) with a fixed seed, so that the decision
    can be computed again from the stored scores.
    """
    assert np.array_equal(now.bytes, baseline.bytes), "scores of different documents cannot be paired"
    count = len(now.nats)
    picks = np.random.Generator(np.random.PCG64(0)).integers(0, count, size=(RESAMPLES, count))
    resampled = 100 * (now.nats[picks].sum(1) / baseline.nats[picks].sum(1) - 1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Judgement(
        baseline=bits_per_byte(baseline.nats, baseline.bytes),
        delta_percent=float(100 * (now.nats.sum() / baseline.nats.sum() - 1)),
        ci_low=float(low),
        ci_high=float(high),
        action="none" if low <= tolerance_percent else "warn",
    )
