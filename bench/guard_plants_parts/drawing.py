"""The figure of the simulated runs: replay and loss over the looks, for three gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.guard_plants_parts.contenders import LADDER, TWO_WAY
from bench.guard_plants_parts.plants import GAINS, NUM_LOOKS, TOLERANCE, Evidences, Plant, simulate
from data_pipeline.charts import ALARM, PALETTE, Line, as_svg, draw_level, draw_lines, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAG = 10
SHOCK = 2.5
LAWS = {"two-way": TWO_WAY, "ladder": LADDER}
SOURCE = "Simulated: cosine rate, 125 looks, one run each (seed 0), lag of 10 looks, start shock."


@as_svg
def draw_plants(evidences: Evidences) -> Figure:
    """Draw one run of each law at each gain.

    Args:
        evidences: How the guard reads the loss.
    """
    figure, charts = new_figure(
        960,
        560,
        rows=2,
        columns=len(GAINS),
        title="Two laws of the guard on models that forget more and more easily",
        source=SOURCE,
    )
    looks = range(NUM_LOOKS)
    for column, gain in enumerate(GAINS):
        shares = []
        losses = []
        for (name, settings), color in zip(LAWS.items(), PALETTE, strict=False):
            run = simulate(Plant(gain=gain, lag=LAG, shock=SHOCK), settings, 0, evidences=evidences)
            percent = [100 * share for share in run.shares]
            shares.append(Line(label=name, x=looks, y=percent, color=color, dots=False))
            losses.append(Line(label=name, x=looks, y=run.losses, color=color, dots=False))
        top = charts[column]
        top.set_ylim(0, 80)
        draw_lines(top, shares, title=f"gain {gain:g}", x_label="", y_label="replay %")
        bottom = charts[len(GAINS) + column]
        draw_lines(bottom, losses, x_label="look", y_label="true loss %", from_zero=True)
        bottom.set_ylim(0, max(1.1 * TOLERANCE, *bottom.get_ylim()))
        draw_level(bottom, TOLERANCE, ALARM, dash="dashed", label="tolerance")
    return figure
