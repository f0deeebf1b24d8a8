"""How the panels are laid out on the 12 columns of the page, without a hole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cpt.telemetry.report.panel import Panel

SMALL_ROW_HEIGHT = 222
"""Height in pixels of a row of small panels, its gap included."""


def beside(left: Panel | None, right: Panel | None) -> list[Panel]:
    """Return two panels that share a row; one alone takes all of it."""
    if left is None or right is None:
        return [replace(panel, width=12) for panel in (left, right) if panel is not None]
    return [left, right]


def num_mixture_rows(num_small: int) -> int:
    """Return how many rows small panels take beside the mixture, two in each row."""
    return max(1, math.ceil(num_small / 2))


def mixture_height(num_small: int) -> int:
    """Return the height in pixels of the mixture's chart, so that it ends where the others do."""
    return max(240, SMALL_ROW_HEIGHT * num_mixture_rows(num_small))


def around_mixture(mixture: Panel | None, small: Sequence[Panel]) -> list[Panel]:
    """Return the mixture with small panels beside it, or the small panels in rows of three."""
    if mixture is None:
        return _in_rows(small, per_row=3)
    if not small:
        return [replace(mixture, width=12)]
    # 4 of the 12 columns are those of the mixture
    rows = _in_rows(small, per_row=2, columns=8)
    num_rows = num_mixture_rows(len(small))
    return [replace(mixture, width=4, num_rows=num_rows, is_small=True), *rows]


def _in_rows(panels: Sequence[Panel], *, per_row: int, columns: int = 12) -> list[Panel]:
    """Return panels of equal width; those of the last row share all of it."""
    placed = []
    for index, panel in enumerate(panels):
        row_start = index - index % per_row
        in_row = min(per_row, len(panels) - row_start)
        placed.append(replace(panel, width=columns // in_row, is_small=True))
    return placed
