"""The plot: time of one pass over the length of the row, full layers on the left, window layers on
the right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_parts.contenders import EAGER, PLAIN
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

SIZE = (545, 320)
LABEL_ROOM = 215
HEADER, FOOTER = 34, 20


def draw(report: dict[str, Any]) -> str:
    """A standalone SVG from what bench/attention.py writes as JSON."""
    results = report["results"]
    kinds = list(dict.fromkeys(result["layer"] for result in results))
    width, height = SIZE[0] * len(kinds), SIZE[1] + HEADER + FOOTER
    times = [value for result in results for value in result["ms"].values()]
    lengths = [float(result["tokens"]) for result in results]
    x = Scale(low=min(lengths) / 1.1, high=max(lengths) * 1.1, log=True)
    y = Scale(low=min(times) / 1.3, high=max(times) * 1.3, log=True)
    parts = []
    for index, kind in enumerate(kinds):
        left = index * SIZE[0]
        title = f"{kind} layer" + (" (128 keys)" if kind == "window" else "")
        parts.append(
            f'<text x="{left + 60}" y="22" font-weight="600" font-size="14" fill="{INK}">{title}</text>'
        )
        panel = _panel([result for result in results if result["layer"] == kind], x, y)
        parts.append(
            f'<svg x="{left}" y="{HEADER}" width="{SIZE[0]}" height="{SIZE[1]}">{panel}</svg>'
        )
    machine = report["machine"]
    source = f"{machine['device']}, {machine['heads']}, bf16, torch {machine['torch']}, {machine['date']}"
    parts.append(f'<text x="60" y="{height - 6}" fill="{MUTED}">{clean(source, 200)}</text>')
    return standalone("".join(parts), width, height)


def _panel(results: list[dict[str, Any]], x: Scale, y: Scale) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["ms"]))
    labels = ("tokens of the row", "ms, forward + backward")
    plot = Plot(size=SIZE, x=x, y=y, labels=labels, right=LABEL_ROOM)
    at_the_end = []
    for index, name in enumerate(names):
        points = [
            (result["tokens"], result["ms"][name]) for result in results if name in result["ms"]
        ]
        tokens, times = (
            np.asarray(values, dtype=np.float64) for values in zip(*points, strict=True)
        )
        color = {EAGER: ALARM, PLAIN: MUTED}.get(name, PALETTE[index % len(PALETTE)])
        plot.line(bin_series(tokens, times), color, dots=True, dash="5 3" if name == PLAIN else "")
        shown = f"this project ({name})" if name == results[0]["ours"] else name
        at_the_end.append((float(times[-1]), color, _label(shown, points[-1])))
    plot.right_labels(at_the_end)
    return plot.svg("time over length")


def _label(name: str, last: tuple[int, float]) -> str:
    milliseconds = f"{last[1]:.0f}" if last[1] >= 10 else f"{last[1]:.2g}"
    return f"{name}: {milliseconds} ms at {last[0] // 1024}k"
