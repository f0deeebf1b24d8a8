"""The figure of the mix curve: the change of every domain over the share of replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpt.planning.mix_curve import Probe, Z, largest_main_share
from data_pipeline.charts import (
    ALARM,
    MUTED,
    PALETTE,
    Line,
    as_svg,
    draw_level,
    draw_lines,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CURVE_POINTS = 120


@as_svg
def draw(probes: Sequence[Probe], tolerance_percent: float) -> Figure:
    """Draw probes as points with their intervals, and fitted curves with their 95 % bands."""
    found = largest_main_share(probes, tolerance_percent)
    usable = sorted(
        (probe for probe in probes if probe.replay_share > 0), key=lambda probe: probe.replay_share
    )
    language = usable[0].main_language
    title = f"{language}: {100 * found['main_share']:.1f} % within {tolerance_percent:g} %"
    figure, (axes,) = new_figure(720, 414, title=title)
    draw_level(axes, 0.0, MUTED)
    text = f"tolerance {tolerance_percent:+g} %"
    draw_level(axes, tolerance_percent, ALARM, dash="dashed", label=text)
    percents = [100 * probe.replay_share for probe in usable]
    grid = np.geomspace(percents[0], percents[-1], NUM_CURVE_POINTS)
    lines = []
    for index, (name, curve) in enumerate(found["curves"].items()):
        color = PALETTE[index % len(PALETTE)]
        mean, half = np.asarray([curve.at(percent / 100) for percent in grid]).T
        lines.append(
            Line(
                label=name,
                x=grid.tolist(),
                y=mean.tolist(),
                low=(mean - half).tolist(),
                high=(mean + half).tolist(),
                color=color,
                dots=False,
            )
        )
        measured, error = np.asarray([probe.change[name] for probe in usable]).T
        axes.errorbar(percents, measured, Z * error, color=color, fmt="none", lw=1.2, capsize=3)
    axes.margins(x=0.03)
    draw_lines(
        axes,
        lines,
        x_label="share of replay, % of the tokens",
        y_label="change of bits per byte in %; up is worse",
    )
    return figure
