"""The figure of a data plan: shares by language and source, epochs, and epochs over the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline.charts import (
    DASHES,
    PALETTE,
    Bar,
    Line,
    as_svg,
    draw_bars,
    draw_lines,
    new_figure,
)
from data_pipeline.mixture.data_plan import WARN_EPOCHS, DataPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 780
BAR_HEIGHT = 24
HEADING_HEIGHT = 50
CURVES_HEIGHT = 360
RATE_HEIGHT = 200


@as_svg
def draw_plan(plan: DataPlan) -> Figure:
    """Draw shares and epochs."""
    bars = {
        "Share of the predicted tokens by language (tick: floor)": _language_bars(plan),
        "Share of the predicted tokens by source": [
            Bar(source.name, source.share, f"{source.share:.1%}") for source in plan.sources
        ],
        f"Epochs by source (tick: max_epochs; orange: above {WARN_EPOCHS:g})": _epoch_bars(plan),
    }
    heights = [HEADING_HEIGHT + BAR_HEIGHT * len(items) for items in bars.values()]
    heights += _curve_heights(plan)
    figure, charts = new_figure(WIDTH, sum(heights), rows=len(heights), height_ratios=heights)
    for axes, (title, items) in zip(charts, bars.items(), strict=False):
        draw_bars(axes, title, items)
    _draw_curves(charts[len(bars) :], plan)
    return figure


@as_svg
def draw_phases(plan: DataPlan) -> Figure:
    """Draw weights, factors on the learning rate and epochs over a run with phases."""
    heights = _curve_heights(plan)
    figure, charts = new_figure(WIDTH, sum(heights), rows=len(heights), height_ratios=heights)
    _draw_curves(charts, plan)
    return figure


def _curve_heights(plan: DataPlan) -> list[int]:
    """Return the heights of the charts over the steps, in their order."""
    heights = [CURVES_HEIGHT] if plan.phases else []
    if plan.changes_rate:
        heights.append(RATE_HEIGHT)
    return [*heights, CURVES_HEIGHT]


def _draw_curves(charts: Sequence[Axes], plan: DataPlan) -> None:
    left = list(charts)
    if plan.phases:
        draw_lines(
            left.pop(0),
            _weight_lines(plan),
            title=f"Weights over the run: {', '.join(_phase_names(plan))}",
            x_label="step",
            y_label="share",
            from_zero=True,
        )
    if plan.changes_rate:
        draw_lines(
            left.pop(0),
            [_rate_line(plan)],
            title="Factor of the phases on the learning rate",
            x_label="step",
            y_label="factor",
            from_zero=True,
        )
    draw_lines(
        left[0],
        _epoch_curves(plan),
        title="Epochs over the run",
        x_label="step",
        y_label="epochs",
    )


def _phase_names(plan: DataPlan) -> list[str]:
    return list(dict.fromkeys(phase.name for phase in plan.phases))


def _language_bars(plan: DataPlan) -> list[Bar]:
    floors = {}
    for limit in plan.limits:
        if limit.min_share > 0 and not limit.phase:
            floors[limit.language] = limit.min_share
    return [
        Bar(name, share, f"{share:.1%}", floors.get(name))
        for name, share in plan.language_shares().items()
    ]


def _epoch_bars(plan: DataPlan) -> list[Bar]:
    bars = []
    for source in plan.sources:
        alarm = source.epochs > WARN_EPOCHS
        text = f"{source.epochs:.2f}"
        bars.append(Bar(source.name, source.epochs, text, source.max_epochs, alarm))
    return bars


def _weight_lines(plan: DataPlan) -> list[Line]:
    """Return the share of every source over the steps, with a jump where a phase begins."""
    steps = []
    for phase in plan.phases:
        steps += [phase.start_step, phase.stop_step]
    lines = []
    for index, source in enumerate(plan.sources):
        shares = []
        for phase in plan.phases:
            shares += [phase.weights[source.name], phase.end_weights[source.name]]
        if any(shares):
            lines.append(
                Line(
                    label=source.name,
                    x=steps,
                    y=shares,
                    color=PALETTE[index % len(PALETTE)],
                    dash=DASHES[index // len(PALETTE) % len(DASHES)],
                    dots=False,
                )
            )
    return lines


def _rate_line(plan: DataPlan) -> Line:
    """Return the factor on the learning rate over the steps, with a jump where a phase begins."""
    steps = []
    factors = []
    for phase in plan.phases:
        steps += [phase.start_step, phase.stop_step]
        factors += [phase.lr_factor, phase.last_lr_factor]
    return Line(label="factor", x=steps, y=factors, color=PALETTE[0], dash=DASHES[0], dots=False)


def _epoch_curves(plan: DataPlan) -> list[Line]:
    lines = []
    for index, source in enumerate(plan.sources):
        if source.epochs:
            lines.append(
                Line(
                    label=source.name,
                    x=plan.curve_steps,
                    y=source.epoch_curve,
                    color=PALETTE[index % len(PALETTE)],
                    dash=DASHES[index // len(PALETTE) % len(DASHES)],
                    dots=False,
                )
            )
    return lines
