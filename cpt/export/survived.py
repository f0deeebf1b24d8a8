"""How much of what the experts learned survives their rounding, on held-out text.

    survived = (nats with the base's experts - nats exported) / (nats with the base's experts - nats
               trained)

The three models differ in the expert matrices only, which are all that rounding can lose: with the
base's experts everything else, the experts' biases included, is as trained. The share is 1 if the
export is as good as the trained model, 0 if the base's experts would have done as well, and above 1
if the export is better. Nothing is divided where trained and base's experts do not differ beyond
the 95 % interval of their paired difference: then the share is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt.guard.paired_test import CONFIDENCE, compare_scores, margin_of_error, resamples
from cpt.guard.score import DomainScore, Floats

Json = dict[str, Any]


def survived_by_domain(
    trained: Sequence[DomainScore],
    base_experts: Sequence[DomainScore],
    exported: Sequence[DomainScore],
) -> list[Json]:
    """Return what survived in every domain, as JSON values.

    Args:
        trained: Scores of the trained model, by domain.
        base_experts: Scores of the same model with the base's expert matrices.
        exported: Scores of the exported model.
    """
    found = []
    for now, before, rounded in zip(trained, base_experts, exported, strict=True):
        learned = compare_scores(before, now)
        is_resolved = learned.ci_low > 0 or learned.ci_high < 0
        # with so few documents that they bear no bound there is no interval to speak of
        is_resolved = is_resolved and math.isfinite(learned.upper_bound)
        found.append(
            {
                "domain": now.name,
                "language": now.language,
                "documents": len(now.nats),
                "bits_per_byte_trained": now.bits_per_byte,
                "bits_per_byte_base_experts": before.bits_per_byte,
                "bits_per_byte_exported": rounded.bits_per_byte,
                "learned_percent": learned.delta_percent,
                "learned_ci_low": learned.ci_low,
                "learned_ci_high": learned.ci_high,
                "survived": _share(now, before, rounded) if is_resolved else None,
            }
        )
    return found


def _share(trained: DomainScore, base_experts: DomainScore, exported: DomainScore) -> Json:
    """Return the share that survived, with a 95 % interval: the wider of a bootstrap over documents
    and of Student's t, as in `compare_scores`.
    """
    left = base_experts.nats - exported.nats
    learned = base_experts.nats - trained.nats
    share = float(left.sum() / learned.sum())
    low, high = _bootstrap(left, learned)
    margin = margin_of_error(left, learned, (1 - CONFIDENCE) / 2) / 100
    # the sum may be negative, if the trained experts are worse
    margin = abs(margin) if math.isfinite(margin) else 0.0
    return {
        "share": share,
        "ci_low": min(low, share - margin),
        "ci_high": max(high, share + margin),
    }


def _bootstrap(left: Floats, learned: Floats) -> tuple[float, float]:
    picks = resamples(len(left))
    learned_sums = learned[picks].sum(1)
    # a resample of documents that cancel out says nothing
    usable = learned_sums != 0
    shares = left[picks].sum(1)[usable] / learned_sums[usable]
    low, high = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
