"""The planner's curves as a picture: change of every domain over the share of replay, with the
tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpt.planning.mix_curve import Probe, largest_main_share
from cpt.telemetry.plot import (
    ALARM,
    INK,
    MUTED,
    PALETTE,
    Plot,
    Series,
    bin_series,
    clean,
    scale_over,
    standalone,
)

SIZE = (720, 380)
LABEL_ROOM = 170
HEADER = 34


def draw(probes: Sequence[Probe], tolerance_percent: float) -> str:
    """A standalone SVG: probes as points with their intervals, fitted curves with their 95 %
    bands.
    """
    found = largest_main_share(probes, tolerance_percent)
    usable = sorted(
        (probe for probe in probes if probe.replay_share > 0), key=lambda probe: probe.replay_share
    )
    shares = np.asarray([probe.replay_share for probe in usable])
    grid = np.geomspace(shares[0], shares[-1], 120)
    bands = {
        name: np.asarray([curve.at(share) for share in grid]).T
        for name, curve in found["curves"].items()
    }
    points = {name: np.asarray([probe.change[name] for probe in usable]).T for name in bands}
    heights = [*(mean for mean, _ in bands.values()), *(mean for mean, _ in points.values())]
    plot = Plot(
        size=SIZE,
        x=scale_over([100 * shares]),
        y=scale_over(heights, include=[0.0, tolerance_percent]),
        labels=("share of replay, % of the tokens", "change of bits per byte in %; up is worse"),
        right=LABEL_ROOM,
    )
    plot.horizontal(0.0, MUTED, dash="")
    plot.horizontal(tolerance_percent, ALARM, label=f"tolerance {tolerance_percent:+g} %")
    ends = []
    for index, (name, (mean, half)) in enumerate(bands.items()):
        color = PALETTE[index % len(PALETTE)]
        plot.line(Series(x=100 * grid, mean=mean, low=mean - half, high=mean + half), color)
        measured, error = points[name]
        plot.whiskers(
            bin_series(100 * shares, measured, measured - 1.96 * error, measured + 1.96 * error),
            color,
        )
        ends.append((float(mean[-1]), color, name))
    plot.right_labels(ends)
    title = f"{usable[0].main_language}: {100 * found['main_share']:.1f} % within {tolerance_percent:g} %"
    body = (
        f'<text x="60" y="22" font-weight="600" font-size="14" fill="{INK}">{clean(title, 80)}</text>'
        f'<svg y="{HEADER}" width="{SIZE[0]}" height="{SIZE[1]}">{plot.svg("change over replay")}</svg>'
    )
    return standalone(body, SIZE[0], SIZE[1] + HEADER)
