"""The plot of the measured page: steps and an expert layer before and after the fusions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.charts import GRID, PALETTE, as_svg, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pairs = dict[str, tuple[float, float]]
"""Milliseconds before and today, by what was measured."""


@as_svg
def draw(steps: Pairs, experts: Pairs, source: str) -> Figure:
    """Draw one panel for the steps and one for the expert layer."""
    figure, charts = new_figure(1080, 300, rows=1, columns=2, source=source)
    _draw_panel(charts[0], "A step of two layers of gpt-oss-20b, ms", steps)
    _draw_panel(charts[1], "One layer of 32 experts, ms", experts)
    return figure


def _draw_panel(axes: Axes, title: str, pairs: Pairs) -> None:
    positions = range(len(pairs))
    largest = max(before for before, _ in pairs.values())
    axes.barh(positions, [before for before, _ in pairs.values()], height=0.7, color=GRID)
    axes.barh(positions, [now for _, now in pairs.values()], height=0.7, color=PALETTE[0])
    for position, (before, now) in zip(positions, pairs.values(), strict=True):
        digits = 0 if before >= 100 else 1
        text = f"{before:,.{digits}f} to {now:,.{digits}f}, {before / now:.2f} x as fast"
        axes.annotate(text, (before, position), (5, 0), textcoords="offset points", va="center")
    axes.set_title(title)
    axes.set_xlim(0, 1.55 * largest)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_yticks(positions, list(pairs))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
