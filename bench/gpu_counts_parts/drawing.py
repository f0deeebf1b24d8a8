"""The plots: the least time of every part, with a tick where it was before the fusions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.charts import Bar, as_svg, draw_bars, new_figure
from gpu_counts_parts.tables import by_time, milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_SHARE = 0.002
"""Share of the longest part below which a part is not drawn."""


@as_svg
def draw(before: dict[str, Any], now: dict[str, Any]) -> Figure:
    """Draw the table and the one before it, a panel for each shape."""
    names = list(now["shapes"])
    source = (
        "counted on fake tensors, not measured; one micro step; a tick shows the code before any "
        "fusion"
    )
    figure, charts = new_figure(1080, 660, rows=2, columns=2, source=source)
    for axes, name in zip(charts, names, strict=True):
        old = milliseconds(before["shapes"][name])
        new = milliseconds(now["shapes"][name])
        smallest = SMALLEST_SHARE * max(old.values())
        bars = []
        for part in by_time(before):
            largest = max(new.get(part, 0.0), old.get(part, 0.0))
            if largest >= smallest:
                bars.append(_bar(part, old.get(part, 0.0), new.get(part, 0.0)))
        title = f"{name}: {sum(old.values()):,.0f} ms before, {sum(new.values()):,.0f} ms"
        draw_bars(axes, title, bars)
    return figure


def _bar(part: str, old: float, new: float) -> Bar:
    digits = 0 if new >= 100 else 1
    return Bar(part, new, f"{new:,.{digits}f} ms", mark=old)
