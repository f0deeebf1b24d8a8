"""Runs laid over each other on one page, with what differs in their configurations.

Over steps the lines of runs share their points.  Over tokens each run has points of its own; a
tooltip then tells the value of every line at the place of the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.report.chart import STEP_LABEL, StepChart
from cpt.telemetry.report.history import Run, read_run
from cpt.telemetry.report.page import draw_charts, environment, page_facts, page_parts
from cpt.telemetry.report.panel import Cell, LegendEntry, Panel, Table, TableRow, clean
from cpt.telemetry.report.series import (
    Array,
    AxisRange,
    Series,
    bin_series,
    bin_starts,
    range_of_lines,
    step_range,
)
from cpt.telemetry.report.state_card import TONES, WORDS
from cpt.telemetry.report.tiles import amount
from cpt.telemetry.report.token_axis import UNITS as TOKEN_UNITS
from cpt.telemetry.run_end import METRICS
from cpt.telemetry.run_overview import RunOverview, run_overview
from cpt.telemetry.run_tally import JUDGED_MEASURES, UNITS, number
from data_pipeline.charts import ALARM, DASHES, MUTED, PALETTE
from data_pipeline.store.files import write_text

if TYPE_CHECKING:
    from bokeh.models import Range1d

Axis = Literal["steps", "tokens"]
AXES: tuple[Axis, ...] = ("steps", "tokens")
MAX_RUNS = len(PALETTE)
MAX_CELLS = 12
"""Small charts in one panel at most."""
LABEL_ROOM = 0.14
"""Part of a chart's height that is kept above the highest tolerance for its label."""
MAX_WINDOWS = 60
"""Over so many windows the shares of a source are averaged."""
MAX_DIFFERENCES = 300
"""Differing settings that are listed at most."""
SECRET_WORDS = ("secret", "password", "token_", "api_key", "credential")
"""A setting with one of these in its name is not shown."""
HIDDEN = "(hidden)"
MISSING = "-"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparedRun:
    """One run of a comparison; two are equal only if they are the same."""

    name: str
    overview: RunOverview
    run: Run
    color: str
    dash: str

    def column_x(self, axis: Axis, unit: float) -> Array:
        """Return the place of every step on the horizontal axis.

        Args:
            axis: What it counts.
            unit: Tokens in one unit of the axis.
        """
        if axis == "steps":
            return self.run.steps
        return np.cumsum(np.nan_to_num(self.run.column("tokens"))) / unit

    def x_of_steps(self, steps: Array, axis: Axis, unit: float) -> Array:
        """Return the place of some steps on the horizontal axis."""
        if axis == "steps" or not len(self.run.steps):
            return steps
        knots = np.append(self.run.steps[0] - 1, self.run.steps)
        places = np.append(0.0, self.column_x(axis, unit))
        return np.interp(steps, knots, places)


def compared_runs(runs: Mapping[str, tuple[RunOverview, Run]]) -> list[ComparedRun]:
    """Give every run its color, by name."""
    found = []
    for index, (name, (overview, run)) in enumerate(runs.items()):
        found.append(
            ComparedRun(
                name=clean(name, 60),
                overview=overview,
                run=run,
                color=PALETTE[index % len(PALETTE)],
                dash=DASHES[index // len(PALETTE) % len(DASHES)],
            )
        )
    return found


def write_comparison(run_dirs: Sequence[Path], out: Path, axis: Axis) -> Path:
    """Write the page that compares runs.

    Raises:
        ConfigError: a directory holds no metrics.jsonl, or they are too few or too many.
        StorageError: the page cannot be written.
    """
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise ConfigError(f"{len(run_dirs)} runs cannot be compared; give 2 to {MAX_RUNS}.")
    runs = {}
    for name, run_dir in zip(short_names(run_dirs), run_dirs, strict=True):
        if not (run_dir / METRICS).is_file():
            raise ConfigError(f"{run_dir} holds no {METRICS}, so it is no run directory.")
        runs[name] = (run_overview(run_dir), read_run(run_dir))
    try:
        write_text(out, render_comparison(runs, axis))
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror}. Give another place with --out.") from error
    return out


def short_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the ends of paths, as long as it takes to tell them apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path)} ({index})" for index, path in enumerate(parts, 1)]


def render_comparison(runs: Mapping[str, tuple[RunOverview, Run]], axis: Axis) -> str:
    """Return the whole page.

    Args:
        runs: State and log of each run, by name.
        axis: What the horizontal axis counts.
    """
    panels = comparison_panels(compared_runs(runs), axis)
    drawn = draw_charts(panels)
    names = [clean(name, 60) for name in runs]
    template = environment().get_template("comparison.html.jinja")
    return template.render(
        title=" / ".join(names),
        axis=axis,
        panels=panels,
        drawn=drawn,
        facts=page_facts(drawn, None),
        **page_parts(),
    )


def comparison_panels(runs: Sequence[ComparedRun], axis: Axis) -> list[Panel]:
    """Return the panels in the order in which they stand on the page."""
    overlay = _Overlay.of(runs, axis)
    found = [
        _summary(runs),
        overlay.panel("Training loss", "loss", "nats per predicted token", log_beyond=20.0),
        overlay.guard_panel(),
        overlay.panel("Learning rate", "lr", "learning rate", from_zero=True, width=6),
        overlay.panel("Throughput", "tokens_per_second", "tokens/s", from_zero=True, width=6),
        overlay.shares_panel(),
        differences_panel(runs),
    ]
    return [panel for panel in found if panel is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Overlay:
    """Draws one line per run into charts that share their horizontal axis."""

    runs: Sequence[ComparedRun]
    axis: Axis
    unit: float
    """Tokens in one unit of the axis."""
    label: str
    shared: Range1d

    @classmethod
    def of(cls, runs: Sequence[ComparedRun], axis: Axis) -> _Overlay:
        """Set up the axis that all charts share."""
        from bokeh.models import Range1d

        most = max((float(np.nansum(one.run.column("tokens"))) for one in runs), default=0.0)
        power = next((power for power in TOKEN_UNITS if most >= 10.0**power), 0)
        label = f"{TOKEN_UNITS[power]} predicted tokens" if power else "predicted tokens"
        unit = 10.0**power
        places = [one.column_x(axis, unit) for one in runs]
        shown = step_range(np.concatenate([*places, np.zeros(0)]))
        high = shown.high if axis == "steps" else max([1e-9, *(x[-1] for x in places if len(x))])
        return cls(
            runs=runs,
            axis=axis,
            unit=unit,
            label=STEP_LABEL if axis == "steps" else label,
            shared=Range1d(start=shown.low if axis == "steps" else 0.0, end=high),
        )

    def panel(
        self,
        title: str,
        key: str,
        unit: str,
        *,
        from_zero: bool = False,
        log_beyond: float = math.inf,
        width: int = 12,
    ) -> Panel | None:
        """Show one number of every step; None if no run has logged it."""

        def series(one: ComparedRun) -> Series:
            return bin_series(one.column_x(self.axis, self.unit), one.run.column(key))

        lines = self._lines(series)
        if not lines:
            return None
        include = [0.0] if from_zero else []
        values = range_of_lines(lines.values(), include=include, log_beyond=log_beyond)
        chart = self._chart(title, unit, values, lines, height=320 if width == 12 else 220)
        return Panel(
            title=title,
            width=width,
            legend=self._legend(lines),
            cells=(Cell(chart=chart),),
        )

    def guard_panel(self) -> Panel | None:
        """Show the loss of every held-out domain; None if no run was measured."""
        measured: dict[tuple[str, str, str], list[dict[str, list[float]]]] = {}
        kinds = {}
        for index, one in enumerate(self.runs):
            events = [*one.run.guard_events, *one.run.generation_events, *one.run.trace_events]
            for event in events:
                if event.get("measure") not in JUDGED_MEASURES:
                    continue
                kind = str(event.get("kind", "text"))
                key = (str(event.get("domain")), str(event.get("measure") or ""), kind)
                kinds[key] = kind
                points = measured.setdefault(key, [{"x": [], "y": []} for _ in self.runs])[index]
                points["x"].append(float(event["step"]))
                points["y"].append(number(event.get("delta", event.get("delta_percent"))))
        cells = []
        for key, points_by_run in list(measured.items())[:MAX_CELLS]:
            unit = UNITS.get(kinds[key], "")
            cell = self._domain_cell(f"{key[0]} {key[1]}".rstrip(), unit, points_by_run)
            if cell is not None:
                cells.append(cell)
        if not cells:
            return None
        hidden = len(measured) - len(cells)
        more = f"; {hidden} more are not shown" if hidden > 0 else ""
        return Panel(
            title="The guard's domains against the untouched model",
            detail=f"up is worse{more}",
            legend=self._legend(self.runs),
            cells=tuple(cells),
            num_columns=min(3, len(cells)),
        )

    def _domain_cell(
        self, title: str, unit: str, points_by_run: Sequence[dict[str, list[float]]]
    ) -> Cell | None:
        lines = {}
        tolerances = set()
        for one, points in zip(self.runs, points_by_run, strict=True):
            x = one.x_of_steps(np.asarray(points["x"]), self.axis, self.unit)
            series = bin_series(x, np.asarray(points["y"]))
            if len(series):
                lines[one] = series
            for standing in one.overview.guard:
                if standing.title == title and math.isfinite(standing.tolerance):
                    tolerances.add(standing.tolerance)
        if not lines:
            return None
        values = range_of_lines(lines.values(), include=[0.0, *tolerances])
        if tolerances:
            room = LABEL_ROOM * (values.high - values.low)
            values = replace(values, high=max(values.high, max(tolerances) + room))
        chart = self._chart(f"Held-out change of {title}", unit, values, lines, height=190)
        chart.level(0.0, MUTED, dash="solid")
        for tolerance in sorted(tolerances):
            chart.level(tolerance, ALARM, label="tolerance")
        return Cell(chart=chart, heading=clean(title, 60))

    def shares_panel(self) -> Panel | None:
        """Show the share of every source, the largest first; None if no run has logged tokens."""
        shares: dict[str, dict[ComparedRun, Series]] = {}
        totals: dict[str, float] = {}
        for one in self.runs:
            columns = one.run.columns("tokens_by_source")
            if not columns:
                continue
            starts = bin_starts(one.run.steps, min(MAX_WINDOWS, len(one.run.steps)))
            x = one.column_x(self.axis, self.unit)[starts]
            sums = {}
            for name, column in columns.items():
                sums[name] = np.add.reduceat(np.nan_to_num(column), starts)
            all_tokens = np.maximum(np.sum(list(sums.values()), axis=0), 1.0)
            for name, tokens in sums.items():
                share = 100 * tokens / all_tokens
                shares.setdefault(name, {})[one] = bin_series(x, share)
                totals[name] = max(totals.get(name, 0.0), float(np.mean(share)))
        used = [name for name in shares if totals[name] > 0]
        if not used:
            return None
        names = sorted(used, key=lambda name: -totals[name])[:MAX_CELLS]
        cells = []
        for name in names:
            lines = shares[name]
            values = range_of_lines(lines.values(), include=[0.0])
            title = f"Share of {clean(name, 60)}"
            chart = self._chart(title, "% of tokens", values, lines, height=180)
            cells.append(Cell(chart=chart, heading=clean(name, 60)))
        hidden = len(used) - len(cells)
        return Panel(
            title="Share of each source, replay included",
            detail=f"{hidden} smaller sources are not shown" if hidden else "",
            legend=self._legend(self.runs),
            cells=tuple(cells),
            num_columns=min(3, len(cells)),
        )

    def _lines(self, series: Callable[[ComparedRun], Series]) -> dict[ComparedRun, Series]:
        found = {}
        for one in self.runs:
            line = series(one)
            if len(line):
                found[one] = line
        return found

    def _chart(
        self,
        title: str,
        unit: str,
        values: AxisRange,
        lines: Mapping[ComparedRun, Series],
        *,
        height: int,
    ) -> StepChart:
        chart = StepChart(
            height=height,
            steps=self.shared,
            values=values,
            unit=unit,
            title=f"{title} of {len(lines)} runs over {self.axis}",
            step_label=self.label,
            counts_tokens=self.axis == "tokens",
        )
        for one, series in lines.items():
            if np.any(series.high > series.low):
                chart.band(series, one.color, opacity=0.12)
            few = len(series) <= 24
            chart.curve(one.name, series, one.color, dash=one.dash, width=1.7, dots=few)
        return chart

    def _legend(
        self, lines: Mapping[ComparedRun, Series] | Sequence[ComparedRun]
    ) -> tuple[LegendEntry, ...]:
        entries = []
        for one in lines:
            text = one.name
            if isinstance(lines, Mapping):
                text += f" {_short(float(lines[one].mean[-1]))}"
            entries.append(LegendEntry(text=text, color=one.color, dash=one.dash))
        return tuple(entries)


def _short(value: float) -> str:
    """Return a number for a legend."""
    return amount(value) if abs(value) >= 1000 else f"{value:.4g}"


def _summary(runs: Sequence[ComparedRun]) -> Panel:
    """Show where every run stands."""
    rows = []
    for one in runs:
        seen = one.overview
        worst = seen.worst
        texts = (
            one.name,
            WORDS.get(seen.state, seen.state),
            f"{seen.step:,} of {'?' if seen.planned_steps is None else f'{seen.planned_steps:,}'}",
            MISSING if seen.tokens is None else amount(float(seen.tokens)),
            f"{seen.loss:.3f}" if math.isfinite(seen.loss) else MISSING,
            amount(seen.tokens_per_second),
            f"{100 * seen.goodput:.1f} %" if math.isfinite(seen.goodput) else MISSING,
            MISSING if worst is None else f"{clean(worst.title)} {worst.delta:+.2f} {worst.unit}",
        )
        rows.append(TableRow(texts=texts, tones={1: TONES[seen.state]}))
    return Panel(
        title="Where they stand",
        table=Table(
            headings=(
                *("run", "state", "step", "tokens", "last loss", "tokens/s", "goodput"),
                "worst held-out domain",
            ),
            rows=tuple(rows),
        ),
    )


def differences_panel(runs: Sequence[ComparedRun]) -> Panel:
    """List the settings in which the resolved configurations differ."""
    settings = [flat_settings(one.run.config) for one in runs]
    rows = []
    for key in sorted(set().union(*settings)):
        texts = [own.get(key, MISSING) for own in settings]
        if len(set(texts)) > 1:
            rows.append(TableRow(texts=(clean(key, 80), *(clean(text, 120) for text in texts))))
    unread = [one.name for one in runs if not one.run.config]
    notes = [f"the configuration of {name} cannot be read" for name in unread]
    if not rows:
        notes.append("none")
    if len(rows) > MAX_DIFFERENCES:
        notes.append(f"{len(rows) - MAX_DIFFERENCES} more are not shown")
    headings = ("setting", *(one.name for one in runs))
    table = Table(headings=headings, rows=tuple(rows[:MAX_DIFFERENCES])) if rows else None
    return Panel(title="Differences of the configurations", detail="; ".join(notes), table=table)


def flat_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return every value of a configuration by its dotted path; what may be a secret is hidden."""
    found: dict[str, str] = {}
    open_parts: list[tuple[str, Any]] = [("", config)]
    while open_parts:
        path, value = open_parts.pop()
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                open_parts.append((f"{path}.{key}" if path else str(key), inner))
        elif path:
            is_secret = any(word in path.lower() for word in SECRET_WORDS)
            found[path] = HIDDEN if is_secret else str(value)
    return found
