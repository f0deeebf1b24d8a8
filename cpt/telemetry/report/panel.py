"""Panels of the page as data, and the colors and texts that panels have in common.

A panel is data; page.html.jinja turns it into HTML and escapes every text.  Colors follow the
language: a language, the held-out domains in it and the sources in it share one hue everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.series import MAX_POINTS
from cpt.telemetry.run_tally import number
from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.yaml_text import read_yaml
from data_pipeline.charts import PALETTE
from data_pipeline.escaping import escaped_line

KNOWN_LANGUAGES = ("en", "ja", "code", "math")
"""Languages that keep their color from run to run; others follow in alphabetical order."""
UNKNOWN_LANGUAGE_COLOR = "#475569"


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendEntry:
    """One line of a legend: a sample of what is drawn, and its name."""

    text: str
    color: str
    dash: str = "solid"
    """A style of lines that Bokeh and CSS share: solid, dashed or dotted."""
    marker: str = ""
    """One of `chart.MARKERS` if the entry explains a mark instead of a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A chart with its own small heading."""

    chart: StepChart
    heading: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarPart:
    """One part of a bar that is divided by time."""

    share: float
    """Share of the whole bar, 0 to 1."""
    color: str
    text: str
    """Shown when the pointer rests on the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One row of a table."""

    texts: tuple[str | datetime, ...]
    """One text or time per heading; a time is shown in UTC and in the reader's zone."""
    is_strong: bool = False
    """Whether the row sums up others."""
    tones: dict[int, str] = field(default_factory=dict)
    """Colors of texts by their place, of `theme.TEXTS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table below the charts of a panel."""

    headings: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPair:
    """Two texts side by side."""

    heading: str
    question: str
    """Text above both."""
    before: str
    now: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One section of the page."""

    title: str
    width: int = 12
    """Columns of the page that it takes, of 12; those of `layout` change it."""
    num_rows: int = 1
    """Rows of panels that it takes beside others."""
    is_small: bool = False
    """Whether two fit side by side on paper."""
    detail: str = ""
    """Small print behind the title."""
    legend: tuple[LegendEntry, ...] = ()
    legend_beside: bool = False
    """Whether the legend stands to the right of the chart instead of above it."""
    cells: tuple[Cell, ...] = ()
    num_columns: int = 1
    """Cells side by side."""
    bar: tuple[BarPart, ...] = ()
    table: Table | None = None
    """A table below the charts."""
    comparisons: tuple[TextPair, ...] = ()
    """Texts below the table, before and after."""


def language_colors(run: Run) -> dict[str, str]:
    """Return a color for every language of the run; the well-known ones always have the same."""
    named = set(run.columns("loss_by_language"))
    for event in [*run.guard_events, *run.trace_events]:
        named.add(str(event.get("language")))
    order = [*KNOWN_LANGUAGES, *sorted(named.difference(KNOWN_LANGUAGES))]
    colors = {}
    for index, name in enumerate(order):
        if name in named:
            colors[name] = PALETTE[index % len(PALETTE)]
    return colors


def source_languages(run: Run) -> dict[str, str]:
    """Return the language of each source, from the mix that the configuration names.

    The result is empty where that file is not at hand.
    """
    try:
        sources = read_yaml(Path(str(run.setting("data", "mix"))))["sources"]
        labels = [(source["name"], source["language"]) for source in sources]
    except (OSError, MalformedInput, KeyError, TypeError):
        return {}
    languages = {}
    for name, language in labels:
        # a list of aliases of lists would be endless as text
        if isinstance(name, str) and isinstance(language, str):
            languages[name] = language
    return languages


def source_shades(
    names: Sequence[str], languages: dict[str, str], colors: dict[str, str]
) -> dict[str, str]:
    """Return shades of the language's color for its sources; of gray for an unknown language."""
    shades = {}
    for name in names:
        language = languages.get(name)
        kin = [other for other in names if languages.get(other) == language]
        color = colors.get(language or "", UNKNOWN_LANGUAGE_COLOR)
        shades[name] = lighten(color, 0.7 * kin.index(name) / max(len(kin), 3))
    return shades


def lighten(color: str, share_of_white: float) -> str:
    """Mix a color such as #0072b2 with white."""
    mixed = "#"
    for at in (1, 3, 5):
        channel = int(color[at : at + 2], 16)
        mixed += f"{round(channel + (255 - channel) * share_of_white):02x}"
    return mixed


def action_of(event: dict[str, Any]) -> str:
    """Return what the guard did after a measurement; `none` if it did nothing."""
    return str(event.get("action", "none"))


def change_text(event: dict[str, Any]) -> str:
    """Return the change that a measurement found, for people."""
    percent = number(event.get("delta_percent"))
    return f"{percent:+.2f} %" if math.isfinite(percent) else "not a number"


def binning_text(run: Run) -> str:
    """Return how to read lines and bands where steps were averaged; empty where they were not."""
    if len(run.steps) <= MAX_POINTS:
        return ""
    return f"mean of {round(2 * len(run.steps) / MAX_POINTS):,} steps; band: smallest to largest"


def clean(value: object, limit: int = 28) -> str:
    """Make a text safe to show and cut what is overlong; the template escapes what HTML needs."""
    text = escaped_line(str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def duration(seconds: float) -> str:
    """Return seconds for people: 0.42 s, 12.3 s, 4 min 5 s, 3 h 20 min, 12 days 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24:,} days {hours % 24} h"


def moment(seconds: float) -> datetime | str:
    """Return a Unix time in UTC; an empty text if it is not known."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return ""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 start, 2 starts."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
