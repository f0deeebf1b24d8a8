"""The cost of rounding to MXFP4, by held-out domain: bits per byte before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpt.guard.paired_test import compare_scores
from cpt.guard.score import DomainScore

COST_FILE = "mxfp4_cost.json"
"""Bits per byte of held-out text before and after rounding to MXFP4."""
COST_HEADER = ("domain", "bf16", "MXFP4", "change in % (95 % interval)")

Json = dict[str, Any]


def costs_by_domain(before: Sequence[DomainScore], after: Sequence[DomainScore]) -> list[Json]:
    """Return bits per byte of bf16 weights and of the same rounded to MXFP4, paired by document."""
    costs = []
    for exact, rounded in zip(before, after, strict=True):
        change = compare_scores(rounded, exact)
        costs.append(
            {
                "domain": exact.name,
                "language": exact.language,
                "documents": len(exact.nats),
                "bits_per_byte_bf16": exact.bits_per_byte,
                "bits_per_byte_mxfp4": rounded.bits_per_byte,
                "delta_percent": change.delta_percent,
                "ci_low": change.ci_low,
                "ci_high": change.ci_high,
            }
        )
    return costs


def cost_rows(costs: Sequence[Json]) -> list[tuple[str, ...]]:
    """Return the costs as table rows, one per domain."""
    rows: list[tuple[str, ...]] = []
    for cost in costs:
        interval = f"{cost['ci_low']:+.3f} to {cost['ci_high']:+.3f}"
        rows.append(
            (
                cost["domain"],
                f"{cost['bits_per_byte_bf16']:.4f}",
                f"{cost['bits_per_byte_mxfp4']:.4f}",
                f"{cost['delta_percent']:+.3f} ({interval})",
            )
        )
    return rows
