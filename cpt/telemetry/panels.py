"""The plots of the report, one function each: a run and the common step axis in, an HTML section
out.

Colours follow the language: a language, the held-out domains in it and the sources in it share one
hue in all plots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cpt.telemetry.history import Run, number
from cpt.telemetry.plot import (
    ALARM,
    DASHES,
    INK,
    MAX_POINTS,
    MUTED,
    PALETTE,
    Array,
    Plot,
    Scale,
    bin_series,
    bin_starts,
    clean,
    legend,
    scale_over,
    tint,
)

KNOWN_LANGUAGES = ("en", "ja", "code", "math")
"""They keep their colour from run to run; others follow in alphabetical order."""
MAX_MIX_WINDOWS = 150
MAX_MIX_SOURCES = 12
MAX_RESUME_MARKS = 40
WHISKER_LIMIT = 24
"""Up to so many measurements, intervals are drawn as bars: a band would claim knowledge between
them.
"""
TIME_COLORS = (
    "#009e73",
    "#56b4e9",
    "#e69f00",
    "#cc79a7",
    "#0072b2",
    "#882255",
    "#999933",
    "#d55e00",
    "#9ca3af",
)
"""Productive time, then each kind of lost time in the order of `goodput.LOST`."""
STEP_LABEL = "optimizer step"


def language_colors(run: Run) -> dict[str, str]:
    """A colour for every language of the run, the well-known ones always the same."""
    named = set(run.columns("loss_by_language"))
    named |= {str(event.get("language")) for event in run.guard_events}
    order = [*KNOWN_LANGUAGES, *sorted(named.difference(KNOWN_LANGUAGES))]
    return {
        name: PALETTE[index % len(PALETTE)] for index, name in enumerate(order) if name in named
    }


def panel(title: str, css: str, body: str, detail: str = "") -> str:
    """One plot with its heading."""
    small = f" <small>{clean(detail, 80)}</small>" if detail else ""
    return f'<section class="{css}"><h2>{clean(title, 80)}{small}</h2>{body}</section>'


def binning(run: Run) -> str:
    """How lines and bands are to be read where steps were averaged."""
    if len(run.steps) <= MAX_POINTS:
        return ""
    return f"mean of {round(2 * len(run.steps) / MAX_POINTS):,} steps; band: smallest to largest"


def short(name: str, limit: int = 20) -> str:
    """A name that leaves room for its value."""
    return name if len(name) <= limit else name[: limit - 3] + "..."


def empty(reason: str) -> str:
    """What stands in place of a plot."""
    return f'<p class="empty">{clean(reason, 200)}</p>'


def loss_panel(run: Run, x: Scale, colors: dict[str, str]) -> str:
    """Training loss, total and by language."""
    total = bin_series(run.steps, run.column("loss"))
    by_language = {
        name: bin_series(run.steps, y) for name, y in run.columns("loss_by_language").items()
    }
    if not len(total):
        return panel("Training loss", "w5", empty("No step has been logged."))
    names = [name for name in colors if name in by_language and len(by_language[name])]
    everything = [total, *(by_language[name] for name in names)]
    y = scale_over(
        [end for series in everything for end in (series.low, series.high)], log_beyond=20.0
    )
    plot = Plot(
        size=(560, 314 + 150 * (max(2, domain_grid(run)[1]) - 2)),
        x=x,
        y=y,
        labels=(STEP_LABEL, "nats per predicted token"),
    )
    plot.verticals(run.resumes[-MAX_RESUME_MARKS:])
    for name in names:
        plot.line(by_language[name], colors[name], width=1.3)
    plot.line(total, INK, width=2.0)
    entries = [(INK, "", f"all {total.mean[-1]:.3f}")]
    entries += [
        (colors[name], "", f"{short(name)} {by_language[name].mean[-1]:.3f}") for name in names
    ]
    entries += [(MUTED, "1 3", "resumed")] if run.resumes else []
    return panel(
        "Training loss", "w5", legend(entries) + plot.svg("Training loss over steps"), binning(run)
    )


def guard_panel(run: Run, x: Scale, colors: dict[str, str]) -> str:
    """One small plot per held-out domain, each on its own scale: Japanese gains 30 % where English
    may lose 1 %.
    """
    title, css = "Held-out bits per byte against the untouched model", "w7"
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for event in run.guard_events:
        by_domain.setdefault(str(event.get("domain")), []).append(event)
    if not by_domain:
        return panel(title, css, empty("The guard has measured nothing in this run."))
    tolerance = number(run.setting("guard", "tolerance_percent"))
    actions = sorted(
        {action_of(event) for event in run.guard_events} - {"none"},
        key=lambda name: (name != "warn", name),
    )
    num_columns, num_rows = domain_grid(run)
    size = (800 // num_columns - 8, 138 if num_rows > 1 else 300)
    cells = []
    for domain, events in by_domain.items():
        drawing = domain_plot(
            events, x, colors[str(events[-1].get("language"))], tolerance, actions, size
        )
        newest = change(events[-1])
        cells.append(f"<div><h3>{clean(domain, 22)} <small>{newest}</small></h3>{drawing}</div>")
    lines = [(ALARM, "5 3", f"tolerance {tolerance:+g} %")] if math.isfinite(tolerance) else []
    style = f"grid-template-columns:repeat({num_columns},minmax(0,1fr))"
    body = f'{legend(lines, actions)}<div class="small" style="{style}">{"".join(cells)}</div>'
    return panel(title, css, body, "change in %, 95 % interval; up is worse")


def domain_grid(run: Run) -> tuple[int, int]:
    """Columns and rows for the plots of the held-out domains."""
    count = len({str(event.get("domain")) for event in run.guard_events})
    num_columns = next((n for n in (1, 2, 3, 4) if n * 2 >= count), 5)
    return num_columns, math.ceil(count / num_columns)


def action_of(event: dict[str, Any]) -> str:
    """What the guard did after a measurement; `none` if nothing."""
    return str(event.get("action", "none"))


def change(event: dict[str, Any]) -> str:
    """The change that a measurement found, for people."""
    percent = number(event.get("delta_percent"))
    return f"{percent:+.2f} %" if math.isfinite(percent) else "not a number"


def domain_plot(
    events: Sequence[dict[str, Any]],
    x: Scale,
    color: str,
    tolerance: float,
    actions: Sequence[str],
    size: tuple[int, int],
) -> str:
    """The change of one domain with its interval, the tolerance and the actions."""
    steps, delta, low, high = (
        np.asarray([number(event.get(key)) for event in events])
        for key in ("step", "delta_percent", "ci_low", "ci_high")
    )
    series = bin_series(steps, delta, low, high)
    lines = [0.0, tolerance] if math.isfinite(tolerance) else [0.0]
    plot = Plot(
        size=size,
        x=x,
        y=scale_over([series.low, series.high], include=lines),
        labels=("step", "%"),
        left=42,
    )
    plot.horizontal(0.0, MUTED, dash="")
    if math.isfinite(tolerance):
        plot.horizontal(tolerance, ALARM)
    few = len(series) <= WHISKER_LIMIT
    if few:
        plot.whiskers(series, color)
    else:
        plot.area(series.x, series.low, series.high, color, opacity=0.18)
    plot.line(replace(series, low=series.mean, high=series.mean), color, dots=few)
    acted = [event for event in events if action_of(event) != "none"]
    plot.marks(
        [
            (
                e["step"],
                actions.index(action_of(e)),
                f"{action_of(e)}, step {e['step']:,}: {change(e)}",
            )
            for e in acted
        ]
    )
    return plot.svg(f"Held-out change of {events[0].get('domain')}")


def mixture_panel(run: Run, x: Scale, colors: dict[str, str]) -> str:
    """Shares of the sources, averaged over windows of steps."""
    title, css = "Data mixture", "w4 tall"
    counts = {
        name: np.nan_to_num(column) for name, column in run.columns("tokens_by_source").items()
    }
    counts = {name: column for name, column in counts.items() if column.sum() > 0}
    if not counts:
        return panel(title, css, empty("No predicted tokens have been logged."))
    languages = source_languages(run)
    names = stacking_order(counts, languages, colors)
    starts = bin_starts(run.steps, min(MAX_MIX_WINDOWS, max(1, len(run.steps) // 5)))
    sums = {name: np.add.reduceat(column, starts) for name, column in counts.items()}
    rest = [name for name in sums if name not in names]
    stack = [(name, sums[name]) for name in names]
    if rest:
        stack.append((f"{len(rest)} smaller", np.sum([sums[name] for name in rest], axis=0)))
    total = np.maximum(np.sum([column for _, column in stack], axis=0), 1.0)
    edges = np.repeat(np.append(run.steps[starts] - 1, run.steps[-1]), 2)[1:-1]
    plot = Plot(
        size=(450, 440),
        x=x,
        y=Scale(low=0.0, high=100.0),
        labels=(STEP_LABEL, "% of predicted tokens"),
        right=150,
    )
    base, labels = np.zeros(len(starts)), []
    shades = source_shades(names, languages, colors)
    for name, column in stack:
        color, top = shades.get(name, "#cbd5e1"), base + 100 * column / total
        plot.area(edges, np.repeat(base, 2), np.repeat(top, 2), color)
        labels.append(
            ((base[-1] + top[-1]) / 2, color, f"{short(name, 15)} {top[-1] - base[-1]:.0f} %")
        )
        base = top
    plot.right_labels(labels)
    width = round(len(run.steps) / len(starts))
    return panel(
        title,
        css,
        plot.svg("Share of each source over steps"),
        f"mean of {width:,} step{'s' * (width > 1)}",
    )


def stacking_order(
    counts: dict[str, Array], languages: dict[str, str], colors: dict[str, str]
) -> list[str]:
    """The largest sources, those of one language side by side."""
    largest = sorted(counts, key=lambda name: -float(counts[name].sum()))
    largest = largest if len(largest) <= MAX_MIX_SOURCES else largest[: MAX_MIX_SOURCES - 1]
    position = {language: index for index, language in enumerate(colors)}
    return sorted(
        (name for name in counts if name in largest),
        key=lambda name: position.get(languages.get(name, ""), len(position)),
    )


def source_shades(
    names: Sequence[str], languages: dict[str, str], colors: dict[str, str]
) -> dict[str, str]:
    """Shades of the language's colour for its sources; of grey where the language is not known."""
    shades = {}
    for name in names:
        kin = [other for other in names if languages.get(other) == languages.get(name)]
        shades[name] = tint(
            colors.get(languages.get(name, ""), "#475569"), 0.7 * kin.index(name) / max(len(kin), 3)
        )
    return shades


def source_languages(run: Run) -> dict[str, str]:
    """Language of each source, from the mix that the configuration names; empty where that file is
    not at hand.
    """
    try:
        mix = yaml.safe_load(Path(str(run.setting("data", "mix"))).read_text(encoding="utf-8"))
        return {str(source["name"]): str(source["language"]) for source in mix["sources"]}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return {}


def rate_panel(run: Run, x: Scale) -> str:
    """Learning rate."""
    return single_panel(run, x, "Learning rate", "lr", "learning rate")


def norm_panel(run: Run, x: Scale) -> str:
    """Gradient norm before clipping, with the level it is clipped to."""
    return single_panel(
        run,
        x,
        "Gradient norm",
        "grad_norm",
        "L2 norm",
        level=number(run.setting("train", "gradient_clipping")),
        log_beyond=10.0,
    )


def throughput_panel(run: Run, x: Scale) -> str:
    """Predicted tokens per second."""
    return single_panel(run, x, "Throughput", "tokens_per_second", "tokens/s")


def single_panel(
    run: Run,
    x: Scale,
    title: str,
    key: str,
    unit: str,
    *,
    level: float = math.nan,
    log_beyond: float = math.inf,
) -> str:
    """One number over steps."""
    series = bin_series(run.steps, run.column(key))
    if not len(series):
        return panel(title, "w4", empty("Not logged in this run."))
    zero = [] if math.isfinite(log_beyond) else [0.0]
    y = scale_over([series.low, series.high], include=zero, log_beyond=log_beyond)
    plot = Plot(size=(450, 196), x=x, y=y, labels=(STEP_LABEL, unit))
    plot.verticals(run.resumes[-MAX_RESUME_MARKS:])
    plot.line(series, "#334155", width=1.5)
    if math.isfinite(level) and y.low <= level <= y.high:
        plot.horizontal(level, MUTED, label=f"clipped to {level:g}")
    return panel(title, "w4", plot.svg(f"{title} over steps"))


def traffic_panel(run: Run, x: Scale) -> str:
    """Bytes that all ranks put on the wire for other ranks, by kind."""
    title = "On the wire"
    kinds = {
        name: bin_series(run.steps, column) for name, column in run.columns("bytes_sent").items()
    }
    kinds = {
        name: series for name, series in kinds.items() if len(series) and series.high.max() > 0
    }
    if not kinds:
        return panel(title, "w4", empty("No rank has sent anything to another."))
    largest = max(float(series.high.max()) for series in kinds.values())
    power = min(5, max(0, math.floor(math.log10(largest) / 3)))
    unit = ("bytes", "kB", "MB", "GB", "TB", "PB")[power]
    columns = run.columns("bytes_sent")
    kinds = {name: bin_series(run.steps, columns[name] / 1000.0**power) for name in kinds}
    y = scale_over([series.high for series in kinds.values()], include=[0.0])
    plot = Plot(size=(450, 180), x=x, y=y, labels=(STEP_LABEL, f"{unit} per step"))
    entries = []
    for index, (name, series) in enumerate(kinds.items()):
        color, dash = tint("#1e293b", 0.22 * (index % 4)), DASHES[index % len(DASHES)]
        plot.line(series, color, dash=dash, width=1.8)
        entries.append((color, dash, f"{short(name)} {series.mean[-1]:.3g} {unit}"))
    return panel(
        title, "w4", legend(entries) + plot.svg("Bytes sent over steps"), "all ranks together"
    )


def time_panel(run: Run) -> str:
    """Where the time of all starts went: one bar, the productive part first."""
    title, spent = "Where the time went", run.goodput
    if spent.total <= 0:
        return panel(title, "w12", empty("No time has been logged."))
    parts = {"productive": spent.productive, **spent.lost}
    x, drawn, entries = 0.0, [], []
    for index, (kind, seconds) in enumerate(parts.items()):
        if seconds <= 0:
            continue
        color, name = TIME_COLORS[index % len(TIME_COLORS)], kind.replace("_", " ")
        width, share = 1376 * seconds / spent.total, 100 * seconds / spent.total
        drawn.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="22" fill="{color}" stroke="#fff" stroke-width="0.7">'
            f"<title>{clean(name)}: {duration(seconds)}, {share:.1f} %</title></rect>"
        )
        entries.append((color, "", f"{name} {duration(seconds)} ({share:.1f} %)"))
        x += width
    bar = f'<svg viewBox="0 0 1376 24" role="img" aria-label="{title}">{"".join(drawn)}</svg>'
    starts = f"{spent.num_starts:,} start{'s' * (spent.num_starts != 1)}"
    return panel(
        title,
        "w12",
        legend(entries) + bar,
        f"goodput {100 * spent.share:.1f} % of {duration(spent.total)}, {starts}",
    )


def duration(seconds: float) -> str:
    """Seconds for people: 0.42 s, 12.3 s, 4 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
