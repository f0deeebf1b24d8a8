"""The plots: one pass over the number of experts; time on the left, peak memory on the right."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpt.telemetry.plot import (
    ALARM,
    INK,
    MUTED,
    PALETTE,
    Plot,
    Scale,
    bin_series,
    clean,
    standalone,
)

SIZE = (500, 300)
HEADER, FOOTER = 34, 20
COLORS = {"this project": PALETTE[0], "eager": ALARM}


def draw(report: dict[str, Any]) -> str:
    """A standalone SVG from what bench/experts.py writes as JSON."""
    results, machine = report["results"], report["machine"]
    panels = [_panel(results, "ms", "ms, forward + backward")]
    if any(value for result in results for value in result["peak MiB"].values()):
        panels.append(_panel(results, "peak MiB", "MiB, peak beyond weights and input"))
    width, height = SIZE[0] * len(panels), SIZE[1] + HEADER + FOOTER
    title = f"gpt-oss MoE layer, {machine['tokens']} tokens, top {machine['top_k']}, {machine['sizes']}, bf16"
    parts = [
        f'<text x="60" y="22" font-weight="600" font-size="14" fill="{INK}">{clean(title, 120)}</text>'
    ]
    for index, panel in enumerate(panels):
        left = index * SIZE[0]
        parts.append(
            f'<svg x="{left}" y="{HEADER}" width="{SIZE[0]}" height="{SIZE[1]}">{panel}</svg>'
        )
    source = f"{machine['device']}, torch {machine['torch']}, clock: {machine['clock']}, {machine['date']}"
    parts.append(f'<text x="60" y="{height - 6}" fill="{MUTED}">{clean(source, 200)}</text>')
    return standalone("".join(parts), width, height)


def _panel(results: list[dict[str, Any]], key: str, label: str) -> str:
    names = list(
        dict.fromkeys(name for result in results for name, value in result[key].items() if value)
    )
    values = [value for result in results for value in result[key].values() if value]
    experts = [float(result["experts"]) for result in results]
    x = Scale(low=min(experts) / 1.2, high=max(experts) * 1.2, log=True)
    y = Scale(low=min(values) / 1.3, high=max(values) * 1.3, log=True)
    plot = Plot(size=SIZE, x=x, y=y, labels=("experts", label), right=150)
    at_the_end = []
    for index, name in enumerate(names):
        points = [
            (result["experts"], result[key][name]) for result in results if result[key].get(name)
        ]
        across, up = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
        color = COLORS.get(name, PALETTE[(index + 1) % len(PALETTE)])
        plot.line(bin_series(across, up), color, dots=True)
        at_the_end.append((float(up[-1]), color, f"{name}: {up[-1]:.0f} at {across[-1]:.0f}"))
    plot.right_labels(at_the_end)
    return plot.svg(f"{label} over experts")
