"""The plots: one pass over the number of experts; time on the left, peak memory on the right."""

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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"this project": PALETTE[0], "eager": PALETTE[5]}
TIME = ("ms", "ms, forward + backward")
MEMORY = ("peak MiB", "MiB, peak beyond weights and input")


@as_svg
def draw(report: dict[str, Any]) -> Figure:
    """Draw what bench/experts.py writes as JSON."""
    results = report["results"]
    machine = report["machine"]
    title = (
        f"gpt-oss MoE layer, {machine['tokens']} tokens, top {machine['top_k']}, "
        f"{machine['sizes']}, bf16"
    )
    source = (
        f"{machine['device']}, torch {machine['torch']}, clock: {machine['clock']}, "
        f"{machine['date']}"
    )
    panels = [TIME]
    if any(value for result in results for value in result["peak MiB"].values()):
        panels.append(MEMORY)
    width = 500 * len(panels)
    figure, charts = new_figure(width, 354, columns=len(panels), title=title, source=source)
    experts = [result["experts"] for result in results]
    for axes, (key, label) in zip(charts, panels, strict=True):
        use_log_scales(axes, experts, [str(count) for count in experts])
        draw_lines(axes, _lines(results, key), x_label="experts", y_label=label)
    return figure


def _lines(results: list[dict[str, Any]], key: str) -> list[Line]:
    lines = []
    names = list(dict.fromkeys(name for result in results for name in result[key]))
    for name in names:
        own = [result for result in results if result[key].get(name)]
        if not own:
            continue
        experts = [result["experts"] for result in own]
        values = [result[key][name] for result in own]
        color = COLORS.get(name, PALETTE[(len(lines) + 1) % len(PALETTE)])
        label = f"{name}: {values[-1]:.0f} at {experts[-1]}"
        lines.append(Line(label=label, x=experts, y=values, color=color))
    return lines
