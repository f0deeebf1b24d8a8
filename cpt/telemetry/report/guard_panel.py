"""The panel of the guard: held-out bits per byte of every domain against the untouched model.

Each domain has its own scale: Japanese gains 30 % where English may lose 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.telemetry.model_label import model_label
from cpt.telemetry.report.chart import MARKERS, StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import Cell, LegendEntry, Panel, action_of, change_text, clean
from cpt.telemetry.report.series import bin_series, range_of_lines
from cpt.telemetry.report.theme import AMBER, GREEN
from cpt.telemetry.run_tally import number
from data_pipeline.charts import ALARM, MUTED

if TYPE_CHECKING:
    from bokeh.models import Range1d

MAX_WHISKERS = 24
"""Up to so many measurements, intervals are bars: a band would claim knowledge between them."""
MARK_ROOM = 0.12
"""Part of a chart's height that is added for the marks of actions."""
RELIEFS = {"lower_replay", "lower_kl", "raise_lr"}
"""Actions that take back an earlier one, because all is well."""
STATE_COLORS = {"green": GREEN, "amber": AMBER, "red": ALARM}
"""Color of the square of each state."""
STATE_MEANING = {"green": "green: kept", "amber": "amber: neither", "red": "red: lost"}
"""What each state says is proven."""
STATE_ROOM = 0.1
"""Part of a chart's height that is added for the squares of states."""
MAX_STATES = 200
"""Up to so many measurements, the state of each is drawn; beyond, only changes of it."""
ROW_HEIGHT = 138
SINGLE_ROW_HEIGHT = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStyle:
    """Style that the charts of all domains have in common."""

    steps: Range1d
    tolerances: Mapping[str, float]
    """In percent, by domain; NaN if it is not known."""
    markers: dict[str, str]
    """Shape of the mark of each action."""
    height: int


def guard_panel(run: Run, steps: Range1d, colors: dict[str, str]) -> Panel | None:
    """Show one small chart per held-out domain; None if no held-out text was measured."""
    title = "Held-out bits per byte against the untouched model"
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for event in run.guard_events:
        by_domain.setdefault(str(event.get("domain")), []).append(event)
    if not by_domain:
        return None
    num_columns, num_rows = domain_grid(run)
    style = DomainStyle(
        steps=steps,
        tolerances=_tolerances(run, by_domain),
        markers=_markers(run),
        height=ROW_HEIGHT if num_rows > 1 else SINGLE_ROW_HEIGHT,
    )
    cells = []
    for domain, events in by_domain.items():
        chart = _domain_chart(events, colors[str(events[-1].get("language"))], style)
        cells.append(Cell(chart=chart, heading=clean(domain, 60), detail=state_text(events[-1])))
    legend = []
    known = sorted({one for one in style.tolerances.values() if math.isfinite(one)})
    if known:
        text = f"tolerance {', '.join(f'{one:+g}' for one in known)} %"
        legend.append(LegendEntry(text=text, color=ALARM, dash="dashed"))
    for state, color in STATE_COLORS.items():
        if any(event.get("state") == state for event in run.guard_events):
            legend.append(LegendEntry(text=STATE_MEANING[state], color=color, marker="square"))
    for action, marker in style.markers.items():
        color = MUTED if action in RELIEFS else ALARM
        legend.append(LegendEntry(text=clean(action), color=color, marker=marker))
    detail = "change in %, 95 % interval; up is worse"
    baseline = run.setting("guard", "baseline_model")
    if baseline:
        detail += f"; the untouched model is {clean(model_label(str(baseline)), 60)}"
    return Panel(
        title=title,
        width=7,
        detail=detail,
        legend=tuple(legend),
        cells=tuple(cells),
        num_columns=num_columns,
    )


def domain_grid(run: Run) -> tuple[int, int]:
    """Return how many columns and rows the charts of the held-out domains take."""
    count = len({str(event.get("domain")) for event in run.guard_events})
    num_columns = next((n for n in (1, 2, 3, 4) if n * 2 >= count), 5)
    return num_columns, math.ceil(count / num_columns)


def _tolerances(run: Run, domains: Iterable[str]) -> dict[str, float]:
    """Return the tolerance of each domain: its own, or that of all."""
    own = run.setting("guard", "domains")
    tolerances = {}
    for domain in domains:
        limits = own.get(domain) if isinstance(own, dict) else None
        tolerance = number(limits.get("tolerance_percent") if isinstance(limits, dict) else None)
        if math.isnan(tolerance):
            tolerance = number(run.setting("guard", "tolerance_percent"))
        tolerances[domain] = tolerance
    return tolerances


def _markers(run: Run) -> dict[str, str]:
    """Give every action of the run a shape; a warning comes first."""
    actions = {action_of(event) for event in run.guard_events} - {"none"}
    order = sorted(actions, key=lambda name: (name != "warn", name))
    return {action: MARKERS[index % len(MARKERS)] for index, action in enumerate(order)}


def _domain_chart(events: Sequence[dict[str, Any]], color: str, style: DomainStyle) -> StepChart:
    """Draw the change of one domain with its interval, the tolerance and the actions."""
    columns = {}
    for key in ("step", "delta_percent", "ci_low", "ci_high"):
        columns[key] = np.asarray([number(event.get(key)) for event in events])
    series = bin_series(
        columns["step"], columns["delta_percent"], columns["ci_low"], columns["ci_high"]
    )
    levels = [0.0]
    domain = str(events[0].get("domain"))
    if math.isfinite(style.tolerances[domain]):
        levels.append(style.tolerances[domain])
    values = range_of_lines([series], include=levels)
    if any(action_of(event) != "none" for event in events):
        values = replace(values, high=values.high + MARK_ROOM * (values.high - values.low))
    if any(event.get("state") in STATE_COLORS for event in events):
        values = replace(values, low=values.low - STATE_ROOM * (values.high - values.low))
    chart = StepChart(
        height=style.height,
        steps=style.steps,
        values=values,
        unit="%",
        title=f"Held-out change of {clean(domain, 60)}",
        step_label="step",
    )
    chart.level(0.0, MUTED, dash="solid")
    for level in levels[1:]:
        chart.level(level, ALARM)
    few = len(series) <= MAX_WHISKERS
    if few:
        chart.whiskers(series, color)
    else:
        chart.band(series, color, opacity=0.18)
    chart.curve(clean(domain), series, color, dots=few)
    for action, marker in style.markers.items():
        acted = [event for event in events if action_of(event) == action]
        texts = [f"{clean(action)}, step {e['step']:,}: {change_text(e)}" for e in acted]
        if acted:
            mark_color = MUTED if action in RELIEFS else ALARM
            chart.marks([event["step"] for event in acted], marker, texts, mark_color)
    draw_states(chart, events)
    return chart


def draw_states(chart: StepChart, events: Sequence[dict[str, Any]]) -> None:
    """Draw the states of one domain; of very many measurements, those that differ from the last."""
    shown = []
    before = None
    for event in events:
        state = event.get("state")
        if state in STATE_COLORS and (len(events) <= MAX_STATES or state != before):
            shown.append(event)
        before = state
    if shown:
        chart.squares(
            [event["step"] for event in shown],
            [STATE_COLORS[event["state"]] for event in shown],
            [f"step {event['step']:,}: {state_text(event)}" for event in shown],
        )


def state_text(event: dict[str, Any]) -> str:
    """Return the change that a measurement found and the state that follows, for people."""
    state = event.get("state")
    return f"{change_text(event)}, {state}" if state in STATE_COLORS else change_text(event)
