"""The figure of the proof: how much of what the experts learned survives an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpt.model.weights.mxfp4 import EXPONENT_RULES
from data_pipeline.charts import MUTED, PALETTE, Line, as_svg, draw_level, draw_lines, new_figure
from mxfp4_parts.cells import METHODS, SECOND_RUN
from mxfp4_parts.outcome import groups, mean_of, survived

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = {"plain": "dashed", "aware": "solid"}
LOWEST_PERCENT = -40.0
HIGHEST_PERCENT = 140.0
"""What lies beyond is drawn at the border."""


@as_svg
def draw(results: Sequence[dict[str, Any]], source: str) -> Figure:
    """Draw one panel per release, and in it each rule in a color; a dot is a seed, a line the mean.

    Args:
        results: The cells; second runs, which have one learning rate, are left out.
        source: Small print: machine, versions, date.
    """
    results = [result for result in results if not result["arm"].endswith(SECOND_RUN)]
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
            color = PALETTE[index]
            lines.append(_line(moved, by_rate, method, rule, label, color))
            _draw_seeds(axes, moved, by_rate, method, rule, color)
    shown = [line for line in lines if line.x]
    y_label = "survived, %" if has_axis_label else ""
    draw_lines(
        axes, shown, title=f"release: {arm}", x_label="movement of the experts, %", y_label=y_label
    )


def _draw_seeds(
    axes: Axes,
    moved: Sequence[float],
    by_rate: Sequence[Sequence[dict[str, Any]]],
    method: str,
    rule: str,
    color: str,
) -> None:
    """Draw every seed: hollow after plain training, filled after MXFP4-aware training."""
    for place, group in zip(moved, by_rate, strict=True):
        for result in group:
            share = 100 * survived(result, method, rule)
            if not math.isnan(share):
                face = "none" if method == "plain" else color
                axes.scatter(
                    [place], [_clipped(share)], s=9, facecolors=face, edgecolors=color, lw=0.7
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
    y = []
    for place, group in zip(moved, by_rate, strict=True):
        share = mean_of(group, lambda result: 100 * survived(result, method, rule))
        if share.count:
            x.append(place)
            y.append(_clipped(share.mean))
    return Line(label=label, x=x, y=y, color=color, dash=DASHES[method], dots=False)


def _clipped(percent: float) -> float:
    return min(max(percent, LOWEST_PERCENT), HIGHEST_PERCENT)
