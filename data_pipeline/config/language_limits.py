"""Bounds on the share of a language in a mix, and in a phase of its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WEIGHT_SUM_TOLERANCE = 1e-6
"""Largest distance of a sum of weights from 1 that counts as rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageLimits:
    """Bounds on the share of the predicted tokens that a language may have."""

    min_share: float = 0.0
    """Smallest share, 0 to 1."""
    max_share: float = 1.0
    """Largest share, 0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one language."""
        for key, value in (("min_share", self.min_share), ("max_share", self.max_share)):
            if not 0 <= value <= 1:
                yield key, f"is {value:g}, must be from 0 to 1 (a share of the tokens)."
        if self.min_share > self.max_share:
            yield (
                "min_share",
                f"is {self.min_share:g}, above max_share {self.max_share:g}. No mix can meet both.",
            )
