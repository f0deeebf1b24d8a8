"""The panel of own traces: how far the model has moved from what the untouched model wrote.

The line of text tokens and the one of control tokens are means over the traces. The bar or band
holds the bounds of the one that decides the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import Cell, LegendEntry, Panel, action_of, clean
from cpt.telemetry.report.series import bin_series, range_of_lines
from cpt.telemetry.run_tally import number
from data_pipeline.charts import ALARM, INK, MUTED

if TYPE_CHECKING:
    from bokeh.models import Range1d

FEW_POINTS = 24
"""Up to so many measurements, points are marked and bounds are bars."""
MARK_ROOM = 0.12
"""Part of a chart's height that is added for the marks of actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """Style that the charts of all domains have in common."""

    steps: Range1d
    color: str
    """Color of the text tokens."""


def trace_panel(run: Run, steps: Range1d, colors: dict[str, str]) -> Panel | None:
    """Show one small chart per domain; None if the run has no traces."""
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for event in run.trace_events:
        by_domain.setdefault(str(event.get("domain")), []).append(event)
    if not by_domain:
        return None
    cells = []
    for domain, events in by_domain.items():
        color = colors.get(str(events[-1].get("language")), INK)
        chart = _domain_chart(events, _Style(steps=steps, color=color))
        cells.append(Cell(chart=chart, heading=clean(domain, 60), detail=_newest(events[-1])))
    return Panel(
        title="Divergence on the untouched model's own replies",
        detail="nats a token; the bar holds what is certain; up is worse",
        legend=(
            LegendEntry(text="control tokens", color=MUTED),
            LegendEntry(text="tolerance", color=ALARM, dash="dashed"),
        ),
        cells=tuple(cells),
        num_columns=min(4, len(cells)),
    )


def _newest(event: dict[str, Any]) -> str:
    return f"{number(event.get('divergence')):.3g}, {clean(event.get('state'), 24)}"


def _domain_chart(events: list[dict[str, Any]], style: _Style) -> StepChart:
    """Draw both divergences of one domain, the bounds, the tolerance and the actions."""
    columns = {}
    for key in ("step", "divergence", "control_divergence", "delta", "lower_bound", "upper_bound"):
        columns[key] = np.asarray([number(event.get(key)) for event in events])
    text = bin_series(columns["step"], columns["divergence"])
    control = bin_series(columns["step"], columns["control_divergence"])
    bounds = bin_series(
        columns["step"], columns["delta"], columns["lower_bound"], columns["upper_bound"]
    )
    levels = [0.0]
    tolerance = number(events[-1].get("tolerance"))
    if np.isfinite(tolerance):
        levels.append(tolerance)
    values = range_of_lines([text, control, bounds], include=levels)
    acted = [event for event in events if action_of(event) != "none"]
    if acted:
        values = replace(values, high=values.high + MARK_ROOM * (values.high - values.low))
    domain = clean(events[0].get("domain"), 60)
    chart = StepChart(
        height=180,
        steps=style.steps,
        values=values,
        unit="nats",
        title=f"Divergence on traces of {domain}",
    )
    for level in levels[1:]:
        chart.level(level, ALARM)
    few = len(bounds) <= FEW_POINTS
    if few:
        chart.whiskers(bounds, style.color)
    else:
        chart.band(bounds, style.color)
    if len(control):
        chart.curve("control tokens", control, MUTED, dots=few)
    chart.curve("text", text, style.color, dots=few)
    if acted:
        texts = [f"{clean(action_of(event))}, step {event['step']:,}" for event in acted]
        chart.marks([event["step"] for event in acted], "triangle", texts)
    return chart
