"""The figure of the proof: how much of what the experts learned survives an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpt.model.weights.mxfp4 import EXPONENT_RULES
from data_pipeline.charts import MUTED, PALETTE, Line, as_svg, draw_level, draw_lines, new_figure
from mxfp4_parts.cells import METHODS
from mxfp4_parts.outcome import Interval, groups, mean_of, survived

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = {"plain": "dashed", "aware": "solid"}
LOWEST_PERCENT = -150.0
HIGHEST_PERCENT = 250.0
"""What lies beyond is cut off: the experts learned too little there for a share of it."""


@as_svg
def draw(results: Sequence[dict[str, Any]], source: str) -> Figure:
    """Draw one panel per release, and in it each rule in a color.

    Args:
        results: The cells.
        source: Small print: machine, versions, date.
    """
    arms = list(dict.fromkeys(arm for arm, _ in groups(results)))
    title = "What survives an MXFP4 export of what the experts learned, in % (Japanese)"
    figure, charts = new_figure(1080, 400, columns=len(arms), title=title, source=source)
    for index, (axes, arm) in enumerate(zip(charts, arms, strict=True)):
        _draw_arm(axes, arm, [result for result in results if result["arm"] == arm], index == 0)
    return figure


def _draw_arm(
    axes: Axes, arm: str, results: Sequence[dict[str, Any]], has_axis_label: bool
) -> None:
    by_rate = list(groups(results).values())
    moved = [mean_of(group, lambda result: 100 * float(result["moved"])).mean for group in by_rate]
    axes.set_xscale("log")
    axes.set_xticks(moved, [f"{value:.1f}" for value in moved])
    axes.minorticks_off()
    axes.set_ylim(LOWEST_PERCENT, HIGHEST_PERCENT)
    draw_level(axes, 100, MUTED, dash="dotted")
    draw_level(axes, 0, MUTED, dash="dotted")
    lines = []
    for method in METHODS:
        for index, rule in enumerate(EXPONENT_RULES):
            label = rule if method == "plain" else f"{rule}, aware"
            lines.append(_line(moved, by_rate, method, rule, label, PALETTE[index]))
    shown = [line for line in lines if line.x]
    y_label = "survived, %" if has_axis_label else ""
    draw_lines(
        axes, shown, title=f"release: {arm}", x_label="movement of the experts, %", y_label=y_label
    )


def _line(
    moved: Sequence[float],
    by_rate: Sequence[Sequence[dict[str, Any]]],
    method: str,
    rule: str,
    label: str,
    color: str,
) -> Line:
    x = []
    found: list[Interval] = []
    for place, group in zip(moved, by_rate, strict=True):
        share = mean_of(group, lambda result: 100 * survived(result, method, rule))
        if share.count:
            x.append(place)
            found.append(share)
    halves = [0.0 if math.isnan(share.half) else share.half for share in found]
    return Line(
        label=label,
        x=x,
        y=[_clipped(share.mean) for share in found],
        low=[_clipped(share.mean - half) for share, half in zip(found, halves, strict=True)],
        high=[_clipped(share.mean + half) for share, half in zip(found, halves, strict=True)],
        color=color,
        dash=DASHES[method],
    )


def _clipped(percent: float) -> float:
    return min(max(percent, LOWEST_PERCENT), HIGHEST_PERCENT)
