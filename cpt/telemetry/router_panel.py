"""The plots of the `router` events: balance of the experts, difference between languages, drift
from the start.

Lines are means over the layers, bands reach from the lowest to the highest layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cpt.telemetry.history import Run, number
from cpt.telemetry.panels import panel, short
from cpt.telemetry.plot import (
    INK,
    PALETTE,
    Plot,
    Scale,
    Series,
    bin_series,
    clean,
    legend,
    scale_over,
)

PLOTS = (
    ("load_max_over_mean", "Busiest expert", "times the mean", 1.0, (1.0,)),
    ("distance", "Load unlike that of all tokens", "%", 100.0, (0.0,)),
    ("overlap", "Choices as before training", "%", 100.0, (100.0,)),
)
"""Key of the event, heading, axis label, factor, and values that the axis includes."""


def router_panel(run: Run, x: Scale, colors: dict[str, str]) -> str:
    """One small plot per quantity; nothing if no step was measured."""
    events = run.router_events
    if not events:
        return ""
    languages = sorted({str(name) for event in events for name in _by_language(event)})
    shades = {
        name: colors.get(name, PALETTE[-1 - index % 4]) for index, name in enumerate(languages)
    }
    cells = []
    for key, title, label, factor, include in PLOTS:
        lines = {"all": _series(run, key, None, factor)}
        lines |= {name: _series(run, key, name, factor) for name in languages}
        lines = {name: series for name, series in lines.items() if len(series)}
        if not lines:
            continue
        ends = [end for series in lines.values() for end in (series.low, series.high)]
        plot = Plot(
            size=(450, 180),
            x=x,
            y=scale_over(ends, include=include),
            labels=("optimizer step", label),
        )
        for name, series in lines.items():
            plot.line(series, shades.get(name, INK), dots=len(series) < 12)
        newest = ", ".join(f"{short(name, 8)} {line.mean[-1]:.3g}" for name, line in lines.items())
        cells.append(
            f"<div><h3>{clean(title, 40)} <small>{clean(newest, 60)}</small></h3>{plot.svg(title)}</div>"
        )
    dropped = number(events[-1].get("dropped"))
    detail = "mean over layers; band: lowest to highest layer; assignments dropped: "
    detail += f"{dropped:.0f}" if math.isfinite(dropped) else "unknown"
    style = f"grid-template-columns:repeat({len(cells)},minmax(0,1fr))"
    key = legend([(INK, "", "all"), *((shades[name], "", name) for name in languages)])
    return panel(
        "Routers", "w12", f'{key}<div class="small" style="{style}">{"".join(cells)}</div>', detail
    )


def _series(run: Run, key: str, language: str | None, factor: float) -> Series:
    rows = [
        _layers(event if language is None else _by_language(event).get(language), key)
        for event in run.router_events
    ]
    mean, low, high = (
        np.asarray([factor * reduce(row) if row else math.nan for row in rows], dtype=np.float64)
        for reduce in (np.mean, min, max)
    )
    steps = np.asarray([event["step"] for event in run.router_events], dtype=np.float64)
    return bin_series(steps, mean, low, high)


def _by_language(event: dict[str, Any]) -> dict[str, Any]:
    found = event.get("by_language")
    return found if isinstance(found, dict) else {}


def _layers(values: Any, key: str) -> list[float]:
    """The finite numbers of a list with one entry per layer."""
    found = values.get(key) if isinstance(values, dict) else None
    numbers = [number(value) for value in found] if isinstance(found, list) else []
    return [value for value in numbers if math.isfinite(value)]
