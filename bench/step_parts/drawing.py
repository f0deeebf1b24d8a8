"""The plots: tokens per second and peak memory over the length of the row, one row of panels per
number of ranks.
"""

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
from step_parts.cases import EAGER, OURS

SIZE = (540, 280)
HEADER, FOOTER = 34, 20
COLORS = {OURS: PALETTE[0], EAGER: ALARM}


def draw(report: dict[str, Any]) -> str:
    """A standalone SVG from what bench/step.py writes as JSON."""
    results, machine = report["results"], report["machine"]
    rows = list(dict.fromkeys(result["ranks"] for result in results))
    width, height = 2 * SIZE[0], (SIZE[1] + HEADER) * len(rows) + FOOTER
    parts = []
    for index, ranks in enumerate(rows):
        own, top = (
            [result for result in results if result["ranks"] == ranks],
            index * (SIZE[1] + HEADER),
        )
        title = f"One training step, {ranks} process{'es' * (ranks > 1)}"
        parts.append(
            f'<text x="60" y="{top + 22}" font-weight="600" font-size="14" fill="{INK}">{title}</text>'
        )
        for column, (key, label) in enumerate(
            (("tokens/s", "tokens per second"), ("peak MiB", "MiB, peak of a rank"))
        ):
            panel = _panel(own, key, label)
            position = (
                f'x="{column * SIZE[0]}" y="{top + HEADER}" width="{SIZE[0]}" height="{SIZE[1]}"'
            )
            parts.append(f"<svg {position}>{panel}</svg>")
    source = f"{machine['model']}; {machine['device']}, torch {machine['torch']}, {machine['date']}"
    parts.append(f'<text x="60" y="{height - 6}" fill="{MUTED}">{clean(source, 200)}</text>')
    return standalone("".join(parts), width, height)


def _panel(results: list[dict[str, Any]], key: str, label: str) -> str:
    values = [value for result in results for value in result[key].values()]
    lengths = [float(result["tokens"]) for result in results]
    x = Scale(low=min(lengths) / 1.1, high=max(lengths) * 1.1, log=True)
    y = Scale(low=min(values) / 1.3, high=max(values) * 1.3, log=True)
    plot = Plot(size=SIZE, x=x, y=y, labels=("tokens of a row", label), right=190)
    at_the_end = []
    for index, name in enumerate(results[0][key]):
        own = [
            result for result in results if name in result[key]
        ]  # one that needs too much memory is left out
        up = np.asarray([result[key][name] for result in own], dtype=np.float64)
        lengths = [float(result["tokens"]) for result in own]
        color = COLORS.get(name, PALETTE[(index + 1) % len(PALETTE)])
        plot.line(bin_series(np.asarray(lengths), up), color, dots=True)
        at_the_end.append((float(up[-1]), color, f"{name}: {up[-1]:.0f}"))
    plot.right_labels(at_the_end)
    return plot.svg(f"{label} over length")
