"""The plots: the least time of every part, in front of what it was before the fusions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.charts import GRID, PALETTE, as_svg, new_figure
from gpu_counts_parts.tables import change, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_SHARE = 0.002
"""Share of the longest part below which a part is not drawn."""


@as_svg
def draw(before: dict[str, Any], now: dict[str, Any]) -> Figure:
    """Draw the table and the one before it, a panel for each shape."""
    source = (
        "counted on fake tensors, not measured; ms of one micro step of one rank; gray: before any "
        "fusion"
    )
    figure, charts = new_figure(1080, 660, rows=2, columns=2, source=source)
    for axes, (name, shape) in zip(charts, now["shapes"].items(), strict=True):
        _draw_panel(axes, name, milliseconds(before["shapes"][name]), milliseconds(shape))
    return figure


def _draw_panel(axes: Axes, name: str, old: dict[str, float], new: dict[str, float]) -> None:
    longest = {part: max(old.get(part, 0.0), new.get(part, 0.0)) for part in {**old, **new}}
    largest = max(longest.values())
    parts = sorted(longest, key=lambda part: -longest[part])
    parts = [part for part in parts if longest[part] >= SMALLEST_SHARE * largest]
    positions = range(len(parts))
    axes.barh(positions, [old.get(part, 0.0) for part in parts], height=0.7, color=GRID)
    axes.barh(positions, [new.get(part, 0.0) for part in parts], height=0.7, color=PALETTE[0])
    texts = [change(old.get(part, 0.0), new.get(part, 0.0)) for part in parts]
    for position, part, text in zip(positions, parts, texts, strict=True):
        axes.annotate(
            text, (longest[part], position), (5, 0), textcoords="offset points", va="center"
        )
    axes.set_title(f"{name}: {change(sum(old.values()), sum(new.values()))} ms")
    axes.set_xlim(0, 1.2 * largest)
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_yticks(positions, parts)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
