"""The panel of the data mixture: the share of every source over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import (
    Cell,
    LegendEntry,
    Panel,
    clean,
    plural,
    source_languages,
    source_shades,
)
from cpt.telemetry.report.series import Array, AxisRange, bin_starts

if TYPE_CHECKING:
    from bokeh.models import Range1d

MAX_WINDOWS = 150
"""Windows of steps over which shares are averaged."""
MAX_SOURCES = 12
"""Areas that are told apart; if there are more sources, the smallest are one area."""
MAX_PHASES = 4
"""Newest phases of a schedule that are named."""
REST_COLOR = "#cbd5e1"


def mixture_panel(run: Run, steps: Range1d, colors: dict[str, str], height: int) -> Panel | None:
    """Show the shares of the sources, averaged over windows of steps.

    Args:
        run: The run.
        steps: The step axis of the page.
        colors: Color of each language.
        height: Of the chart in pixels, so that it ends where its neighbors end.

    Returns:
        None if no predicted tokens were logged.
    """
    counts = {}
    for name, column in run.columns("tokens_by_source").items():
        tokens = np.nan_to_num(column)
        if tokens.sum() > 0:
            counts[name] = tokens
    if not counts:
        return None
    languages = source_languages(run)
    starts = bin_starts(run.steps, min(MAX_WINDOWS, max(1, len(run.steps) // 5)))
    sums = {name: np.add.reduceat(column, starts) for name, column in counts.items()}
    names = _stacking_order(counts, languages, colors)
    areas = {clean(name): sums[name] for name in names}
    shades = source_shades(names, languages, colors)
    area_colors = {clean(name): shades[name] for name in names}
    rest = sums.keys() - set(names)
    if rest:
        areas[f"{len(rest)} smaller"] = np.sum([sums[name] for name in rest], axis=0)
    chart = StepChart(
        height=height,
        steps=steps,
        values=AxisRange(low=0.0, high=100.0),
        unit="% of predicted tokens",
        title="Share of each source over steps",
    )
    edges = np.repeat(np.append(run.steps[starts] - 1, run.steps[-1]), 2)[1:-1]
    legend = _stack(chart, edges, areas, area_colors)
    width = round(len(run.steps) / len(starts))
    detail = f"mean of {plural(width, 'step')}"
    phases = _phase_starts(run)
    if phases:
        chart.verticals([step for _, step in phases[1:]])
        shown = [f"{clean(name, 24)} from step {step:,}" for name, step in phases[-MAX_PHASES:]]
        detail += f"; phases: {', '.join(shown)}"
    return Panel(
        title="Data mixture",
        width=4,
        detail=detail,
        legend=tuple(legend),
        legend_beside=True,
        cells=(Cell(chart=chart),),
    )


def _phase_starts(run: Run) -> list[tuple[str, int]]:
    """Return the phases of the mix's schedule so far, each with its first step that is known."""
    starts: list[tuple[str, int]] = []
    for event in run.step_events:
        name = event.get("phase")
        if isinstance(name, str) and (not starts or starts[-1][0] != name):
            starts.append((name, int(event["step"])))
    return starts


def _stack(
    chart: StepChart, edges: Array, areas: dict[str, Array], colors: dict[str, str]
) -> list[LegendEntry]:
    """Stack the areas in percent of their sum; return their legend from top to bottom."""
    total = np.maximum(np.sum(list(areas.values()), axis=0), 1.0)
    base = np.zeros(len(total))
    legend = []
    for name, column in areas.items():
        top = base + 100 * column / total
        color = colors.get(name, REST_COLOR)
        chart.stacked_area(name, edges, np.repeat(base, 2), np.repeat(top, 2), color)
        text = f"{clean(name, 48)} {top[-1] - base[-1]:.0f} %"
        legend.append(LegendEntry(text=text, color=color))
        base = top
    return legend[::-1]


def _stacking_order(
    counts: dict[str, Array], languages: dict[str, str], colors: dict[str, str]
) -> list[str]:
    """Return the largest sources, those of one language side by side."""
    largest = sorted(counts, key=lambda name: -float(counts[name].sum()))
    if len(largest) > MAX_SOURCES:
        largest = largest[: MAX_SOURCES - 1]
    by_language: dict[str, list[str]] = {}
    for name in counts:
        if name in largest:
            by_language.setdefault(languages.get(name, ""), []).append(name)
    order = []
    for language in colors:
        order += by_language.pop(language, [])
    for names in by_language.values():
        order += names
    return order
