"""The plot of a plan over many points: cost and speed of the best layouts against the number of
GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpt.planning.estimate import Estimate
from cpt.planning.hardware import Assumptions, Gpu
from cpt.telemetry.plot import (
    DASHES,
    INK,
    MUTED,
    PALETTE,
    Plot,
    Scale,
    bin_series,
    clean,
    scale_over,
    standalone,
)

SIZE = (560, 330)
LABEL_ROOM = 120
HEADER, FOOTER = 34, 24

Point = tuple[str, int, int, Estimate | None]
"""Model, tokens of a row, GPUs, the best layout."""


def draw(points: list[Point], gpu: Gpu, assumed: Assumptions) -> str:
    """A standalone SVG: tokens/s/GPU on the left, GPU-hours per billion tokens on the right."""
    panels: list[tuple[str, str, Callable[[Estimate], float]]] = [
        ("Speed of the best layout", "tokens/s/GPU", lambda one: one.tokens_per_gpu_second),
        (
            "Cost of the best layout",
            "GPU-hours per 1e9 tokens",
            lambda one: one.gpu_hours_per_billion_tokens,
        ),
    ]
    width, height = SIZE[0] * len(panels), SIZE[1] + HEADER + FOOTER
    parts = []
    for index, (title, label, value) in enumerate(panels):
        left = index * SIZE[0]
        parts.append(
            f'<text x="{left + 60}" y="22" font-weight="600" font-size="14" fill="{INK}">{title}</text>'
        )
        panel = _panel(points, label, value)
        parts.append(
            f'<svg x="{left}" y="{HEADER}" width="{SIZE[0]}" height="{SIZE[1]}">{panel}</svg>'
        )
    routing = (
        "balanced routing"
        if assumed.imbalance == 1
        else f"busiest expert rank {assumed.imbalance:g} x the mean"
    )
    source = f"Computed, not measured: {gpu.name}, {assumed.mfu:.0%} of the bf16 peak while computing, {routing}"
    parts.append(f'<text x="60" y="{height - 7}" fill="{MUTED}">{clean(source, 200)}</text>')
    return standalone("".join(parts), width, height)


def _panel(points: list[Point], label: str, value: Callable[[Estimate], float]) -> str:
    gpus = [float(gpus) for *_, gpus, _ in points]
    values = np.asarray([value(one) for *_, one in points if one is not None], dtype=np.float64)
    x = Scale(
        low=min(gpus) / 1.1, high=max(gpus) * 1.1, log=True, given_ticks=tuple(sorted(set(gpus)))
    )
    plot = Plot(
        size=SIZE,
        x=x,
        y=scale_over([values], include=(0.0,)),
        labels=("GPUs (log scale)", label),
        right=LABEL_ROOM,
    )
    models = list(dict.fromkeys(model for model, *_ in points))
    seq_lens = list(dict.fromkeys(seq_len for _, seq_len, *_ in points))
    at_the_end = []
    for model in models:
        for number, seq_len in enumerate(seq_lens):
            series = [
                (g, value(one))
                for m, s, g, one in points
                if one is not None and (m, s) == (model, seq_len)
            ]
            if not series:
                continue
            across, up = (
                np.asarray(column, dtype=np.float64) for column in zip(*series, strict=True)
            )
            color = PALETTE[number % len(PALETTE)]
            plot.line(
                bin_series(across, up),
                color,
                dash=DASHES[models.index(model) % len(DASHES)],
                dots=True,
            )
            at_the_end.append(
                (float(up[-1]), color, f"{model.removeprefix('gpt-oss-')}, {seq_len:,}")
            )
    plot.right_labels(at_the_end)
    return plot.svg(label)
