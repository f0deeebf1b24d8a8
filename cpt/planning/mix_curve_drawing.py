"""The figure of the mix curve: the change of every domain over the share of replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpt.planning.mix_answer import UNDERRATED, UNSAFE, MixAnswer, largest_main_share
from cpt.planning.mix_probe import Probe
from data_pipeline.charts import (
    ALARM,
    INK,
    MUTED,
    PALETTE,
    Line,
    as_svg,
    draw_level,
    draw_lines,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_CURVE_POINTS = 80
Z = 1.96
"""Half a 95 % interval in standard deviations."""


@as_svg
def draw(
    probes: Sequence[Probe], tolerance_percent: float, planned_steps: int | None = None
) -> Figure:
    """Draw probes with the spread of a run, curves with their bands, and the answer.

    The bands have the tails of the answer: where an upper edge meets the tolerance, that domain is
    surely within it.
    """
    answer = largest_main_share(probes, tolerance_percent, planned_steps)
    figure, (axes,) = new_figure(
        760,
        440,
        title=_title(answer, probes[0].main_language),
        source=_small_print(answer, probes),
    )
    draw_level(axes, 0.0, MUTED)
    text = f"tolerance {tolerance_percent:+g} %"
    draw_level(axes, tolerance_percent, ALARM, dash="dashed", label=text)
    grid = np.linspace(answer.curves.smallest_share, answer.curves.largest_share, NUM_CURVE_POINTS)
    draws = np.stack([answer.curves.at(float(share)) for share in grid])
    tails = [UNDERRATED / len(answer.curves.domains), 0.5, 1 - UNSAFE]
    low, middle, high = np.quantile(draws, tails, axis=1)
    lines = []
    for index, name in enumerate(answer.curves.domains):
        color = PALETTE[index % len(PALETTE)]
        lines.append(
            Line(
                label=name,
                x=(100 * grid).tolist(),
                y=middle[:, index].tolist(),
                low=low[:, index].tolist(),
                high=high[:, index].tolist(),
                color=color,
                dots=False,
            )
        )
        run_error = Z * float(np.median(answer.curves.run_spread[:, index]))
        _draw_probes(axes, probes, name, run_error, answer.steps, color)
    axes.margins(x=0.03)
    draw_lines(
        axes,
        lines,
        x_label="share of replay, % of the tokens",
        y_label="change of bits per byte in %; up is worse",
    )
    _draw_answer(axes, answer)
    return figure


def _small_print(answer: MixAnswer, probes: Sequence[Probe]) -> str:
    text = "points: probes; bars: 95 % of what another order of the data gives"
    if any(probe.steps != answer.steps for probe in probes):
        text += f"; open points: other lengths than {answer.steps:,} steps"
    return text


def _title(answer: MixAnswer, language: str) -> str:
    scope = f"within {answer.tolerance_percent:g} %, runs of {answer.steps:,} steps"
    if math.isinf(answer.safe):
        return f"{language}: no share that was tried is surely {scope}"
    at_least = "at least " if answer.safe <= answer.curves.smallest_share else ""
    return f"{language}: {at_least}{100 * (1 - answer.safe):.1f} % is {scope} (99 % sure)"


def _draw_probes(
    axes: Axes, probes: Sequence[Probe], domain: str, run_error: float, steps: int, color: str
) -> None:
    """Draw the measured changes of one domain; probes of another length are open."""
    for probe in probes:
        fill = color if probe.steps == steps else "none"
        axes.errorbar(
            100 * probe.replay_share,
            probe.scores[domain].change_percent,
            run_error,
            color=color,
            markerfacecolor=fill,
            fmt="o",
            markersize=4,
            lw=1,
            capsize=2.5,
        )


def _draw_answer(axes: Axes, answer: MixAnswer) -> None:
    """Mark the interval of the answer at the tolerance; an end that was not tried is an arrow."""
    smallest = answer.curves.smallest_share
    largest = answer.curves.largest_share
    left = 100 * min(answer.least, largest)
    right = 100 * min(answer.safe, largest)
    level = answer.tolerance_percent
    axes.plot([left, right], [level, level], color=INK, lw=4, solid_capstyle="butt", zorder=4)
    marker = ">" if math.isinf(answer.safe) else "D"
    axes.plot([right], [level], marker=marker, markersize=8, color=INK, zorder=5)
    if answer.least <= smallest:
        axes.plot([left], [level], marker="<", markersize=8, color=INK, zorder=5)
    wording = "not enough for sure" if math.isinf(answer.safe) else f"{right:.1f} % replay"
    axes.annotate(
        wording,
        (right, level),
        xytext=(0, -16),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontweight="bold",
    )
