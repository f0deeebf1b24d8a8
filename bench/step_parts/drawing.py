"""The plots: tokens per second and peak memory over the length of the row.

There is one row of panels per number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.charts import (
    PALETTE,
    Line,
    as_svg,
    draw_lines,
    new_figure,
    use_log_scales,
)
from step_parts.cases import EAGER, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {OURS: PALETTE[0], EAGER: PALETTE[5]}
SPEED = ("tokens/s", "tokens per second")
MEMORY = ("peak MiB", "MiB, peak of a rank")


@as_svg
def draw(report: dict[str, Any]) -> Figure:
    """Draw what bench/step.py writes as JSON."""
    results = report["results"]
    machine = report["machine"]
    source = f"{machine['model']}; {machine['device']}, torch {machine['torch']}, {machine['date']}"
    rank_counts = list(dict.fromkeys(result["ranks"] for result in results))
    height = 314 * len(rank_counts) + 20
    figure, charts = new_figure(1080, height, rows=len(rank_counts), columns=2, source=source)
    for index, ranks in enumerate(rank_counts):
        own = [result for result in results if result["ranks"] == ranks]
        processes = "1 process" if ranks == 1 else f"{ranks} processes"
        left = charts[2 * index]
        right = charts[2 * index + 1]
        _draw_panel(left, own, SPEED, f"One training step, {processes}")
        _draw_panel(right, own, MEMORY, "")
    return figure


def _draw_panel(
    axes: Axes, results: list[dict[str, Any]], quantity: tuple[str, str], title: str
) -> None:
    key, label = quantity
    lengths = [result["tokens"] for result in results]
    use_log_scales(axes, lengths, [f"{tokens:,}" for tokens in lengths])
    lines = []
    for index, name in enumerate(results[0][key]):
        # a contender that needs too much memory at some length is left out there
        own = [result for result in results if name in result[key]]
        values = [result[key][name] for result in own]
        lines.append(
            Line(
                label=f"{name}: {values[-1]:.0f}",
                x=[result["tokens"] for result in own],
                y=values,
                color=COLORS.get(name, PALETTE[(index + 1) % len(PALETTE)]),
            )
        )
    draw_lines(axes, lines, title=title, x_label="tokens of a row", y_label=label)
