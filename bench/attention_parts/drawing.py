"""The plot: time of one pass over the length of the row, full layers left, window layers right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attention_parts.contenders import EAGER, PLAIN
from data_pipeline.charts import (
    MUTED,
    PALETTE,
    Line,
    as_svg,
    draw_lines,
    new_figure,
    use_log_scales,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {EAGER: PALETTE[5], PLAIN: MUTED}
DASHES = {PLAIN: "dashed"}


@as_svg
def draw(report: dict[str, Any]) -> Figure:
    """Draw what bench/attention.py writes as JSON."""
    results = report["results"]
    machine = report["machine"]
    source = (
        f"{machine['device']}, {machine['heads']}, bf16, torch {machine['torch']}, "
        f"{machine['date']}"
    )
    kinds = list(dict.fromkeys(result["layer"] for result in results))
    figure, charts = new_figure(1090, 374, columns=len(kinds), source=source)
    for axes, kind in zip(charts, kinds, strict=True):
        axes.sharey(charts[0])
        own = [result for result in results if result["layer"] == kind]
        lengths = [result["tokens"] for result in own]
        use_log_scales(axes, lengths, [_short(result) for result in own])
        title = f"{kind} layer" + (" (128 keys)" if kind == "window" else "")
        draw_lines(
            axes,
            _lines(own),
            title=title,
            x_label="tokens of the row",
            y_label="ms, forward + backward",
        )
    return figure


def _lines(results: list[dict[str, Any]]) -> list[Line]:
    lines = []
    names = list(dict.fromkeys(name for result in results for name in result["ms"]))
    for index, name in enumerate(names):
        own = [result for result in results if name in result["ms"]]
        shown = f"this project ({name})" if name == results[0]["ours"] else name
        last = own[-1]["ms"][name]
        milliseconds = f"{last:.0f}" if last >= 10 else f"{last:.2g}"
        lines.append(
            Line(
                label=f"{shown}: {milliseconds} ms at {_short(own[-1])}",
                x=[result["tokens"] for result in own],
                y=[result["ms"][name] for result in own],
                color=COLORS.get(name, PALETTE[index % len(PALETTE)]),
                dash=DASHES.get(name, "solid"),
            )
        )
    return lines


def _short(result: dict[str, Any]) -> str:
    return f"{result['tokens'] // 1024}k"
