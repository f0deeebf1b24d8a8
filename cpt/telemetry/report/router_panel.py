"""The panel of the `router` events: balance of the experts, languages, drift from the start.

Lines are means over the layers; bands reach from the lowest to the highest layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import Cell, LegendEntry, Panel, clean
from cpt.telemetry.report.series import Series, bin_series, range_of_lines
from cpt.telemetry.run_tally import number
from data_pipeline.charts import INK, PALETTE

if TYPE_CHECKING:
    from bokeh.models import Range1d

FEW_POINTS = 12
"""Up to so many points of a line, each is marked with a dot."""
ALL_TOKENS = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One number that every layer's router has."""

    key: str
    """Name of the number in the event."""
    heading: str
    unit: str
    factor: float = 1.0
    """From the number in the event to the unit."""
    include: tuple[float, ...] = ()
    """Values that the axis shows in any case."""


QUANTITIES = (
    Quantity(
        key="load_max_over_mean", heading="Busiest expert", unit="times the mean", include=(1.0,)
    ),
    Quantity(
        key="distance",
        heading="Load unlike that of all tokens",
        unit="%",
        factor=100.0,
        include=(0.0,),
    ),
    Quantity(
        key="overlap",
        heading="Choices as before training",
        unit="%",
        factor=100.0,
        include=(100.0,),
    ),
)


def router_panel(run: Run, steps: Range1d, colors: dict[str, str]) -> Panel | None:
    """Show one small chart per quantity; None if no step was measured."""
    if not run.router_events:
        return None
    languages: set[str] = set()
    for event in run.router_events:
        languages.update(_by_language(event))
    shades = {ALL_TOKENS: INK}
    for index, name in enumerate(sorted(languages)):
        shades[name] = colors.get(name, PALETTE[-1 - index % 4])
    cells = []
    for quantity in QUANTITIES:
        cell = _cell(run, steps, quantity, shades)
        if cell is not None:
            cells.append(cell)
    dropped = number(run.router_events[-1].get("dropped"))
    told = f"{dropped:.0f}" if math.isfinite(dropped) else "unknown"
    return Panel(
        title="Routers",
        detail=f"mean over layers; band: lowest to highest layer; assignments dropped: {told}",
        legend=tuple(LegendEntry(text=clean(name), color=color) for name, color in shades.items()),
        cells=tuple(cells),
        num_columns=max(1, len(cells)),
    )


def _cell(run: Run, steps: Range1d, quantity: Quantity, shades: dict[str, str]) -> Cell | None:
    """Draw one quantity, of all tokens and by language; None if no event has it."""
    lines = {}
    for name in shades:
        series = _series(run, quantity, name)
        if len(series):
            lines[name] = series
    if not lines:
        return None
    chart = StepChart(
        height=180,
        steps=steps,
        values=range_of_lines(lines.values(), include=quantity.include),
        unit=quantity.unit,
        title=quantity.heading,
    )
    newest = []
    for name, series in lines.items():
        chart.band(series, shades[name])
        chart.curve(clean(name), series, shades[name], dots=len(series) < FEW_POINTS)
        newest.append(f"{clean(name, 24)} {series.mean[-1]:.3g}")
    return Cell(chart=chart, heading=quantity.heading, detail=", ".join(newest))


def _series(run: Run, quantity: Quantity, name: str) -> Series:
    """Return one quantity over steps, of a language or of all tokens."""
    steps = []
    columns: dict[str, list[float]] = {"mean": [], "low": [], "high": []}
    for event in run.router_events:
        values = event if name == ALL_TOKENS else _by_language(event).get(name)
        layers = _layers(values, quantity.key)
        if layers:
            steps.append(event["step"])
            columns["mean"].append(quantity.factor * float(np.mean(layers)))
            columns["low"].append(quantity.factor * min(layers))
            columns["high"].append(quantity.factor * max(layers))
    return bin_series(
        np.asarray(steps, dtype=np.float64),
        np.asarray(columns["mean"], dtype=np.float64),
        np.asarray(columns["low"], dtype=np.float64),
        np.asarray(columns["high"], dtype=np.float64),
    )


def _by_language(event: dict[str, Any]) -> dict[str, Any]:
    found = event.get("by_language")
    return found if isinstance(found, dict) else {}


def _layers(values: Any, key: str) -> list[float]:
    """Return the finite numbers of a list with one entry per layer."""
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, list):
        return []
    numbers = [number(value) for value in found]
    return [value for value in numbers if math.isfinite(value)]
