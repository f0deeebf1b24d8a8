"""The panels about training itself: time, loss, learning rate, norm, throughput, traffic, KL.

Each function takes a run and the step axis that all charts share, and returns a panel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import (
    BarPart,
    Cell,
    LegendEntry,
    Panel,
    Table,
    TableRow,
    binning_text,
    clean,
    duration,
    lighten,
    moment,
    plural,
    source_languages,
    source_shades,
)
from cpt.telemetry.report.series import Series, bin_series, range_of_lines
from cpt.telemetry.run_tally import number
from data_pipeline.charts import INK, MUTED

if TYPE_CHECKING:
    from bokeh.models import Range1d

MAX_SHOWN_STARTS = 12
"""Newest starts that the table lists."""
FEW_POINTS = 12
"""Up to so many points of a line, each is marked with a dot."""
SINGLE_COLOR = "#334155"
TIME_COLORS = (
    "#009e73",
    "#3a92cc",
    "#c28200",
    "#cc79a7",
    "#0072b2",
    "#882255",
    "#999933",
    "#d55e00",
    "#8b929c",
)
"""Colors of productive time, then of each kind of lost time in the order of `goodput.LOST`."""
LINE_STYLES = ("solid", "dashed", "dotted")
BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def time_panel(run: Run) -> Panel | None:
    """Show where the time of all starts went, as one bar with the productive part first."""
    title = "Where the time went"
    spent = run.goodput
    if spent.total <= 0:
        return None
    parts = []
    legend = []
    kinds = {"productive": spent.productive, **spent.lost}
    for (kind, seconds), color in zip(kinds.items(), TIME_COLORS, strict=True):
        if seconds <= 0:
            continue
        name = kind.replace("_", " ")
        share = seconds / spent.total
        text = f"{name}: {duration(seconds)}, {100 * share:.1f} %"
        parts.append(BarPart(share=share, color=color, text=text))
        text = f"{name} {duration(seconds)} ({100 * share:.1f} %)"
        legend.append(LegendEntry(text=text, color=color))
    goodput = f"goodput {100 * spent.share:.1f} % of {duration(spent.total)}"
    return Panel(
        title=title,
        detail=f"{goodput}, {plural(spent.num_starts, 'start')}",
        legend=tuple(legend),
        bar=tuple(parts),
    )


def loss_panel(run: Run, steps: Range1d, colors: dict[str, str], height: int) -> Panel | None:
    """Show the training loss, total and by language.

    Args:
        height: Of the chart in pixels, so that it ends where its neighbor ends.
    """
    title = "Training loss"
    total = bin_series(run.steps, run.column("loss"))
    if not len(total):
        return None
    found = _binned_columns(run, "loss_by_language")
    by_language = {name: found[name] for name in colors if name in found}
    chart = StepChart(
        height=height,
        steps=steps,
        values=range_of_lines([total, *by_language.values()], log_beyond=20.0),
        unit="nats per predicted token",
        title="Training loss over steps",
    )
    legend = [LegendEntry(text=f"all {total.mean[-1]:.3f}", color=INK)]
    for name, series in by_language.items():
        chart.line(clean(name), series, colors[name], width=1.3)
        text = f"{clean(name, 48)} {series.mean[-1]:.3f}"
        legend.append(LegendEntry(text=text, color=colors[name]))
    chart.line("all", total, INK, width=2.0)
    return Panel(
        title=title,
        width=5,
        detail=binning_text(run),
        legend=tuple(legend),
        cells=(Cell(chart=chart),),
    )


def rate_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the learning rate."""
    return _single_panel(run, steps, "Learning rate", "lr", "learning rate")


def norm_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the gradient norm before clipping, with the level it is clipped to."""
    level = number(run.setting("train", "gradient_clipping"))
    return _single_panel(
        run, steps, "Gradient norm", "grad_norm", "L2 norm", level=level, log_beyond=10.0
    )


def throughput_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the predicted tokens per second."""
    return _single_panel(run, steps, "Throughput", "tokens_per_second", "tokens/s")


def utilization_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the share of the GPUs' peak arithmetic that the steps reach."""
    return _single_panel(
        run, steps, "Utilization", "utilization", "% of the dense bf16 peak", factor=100.0
    )


def memory_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the most memory that the first rank has used so far."""
    return _single_panel(
        run, steps, "Peak memory of rank 0", "peak_memory_bytes", "GiB", factor=2.0**-30
    )


def _single_panel(
    run: Run,
    steps: Range1d,
    title: str,
    key: str,
    unit: str,
    *,
    level: float = math.nan,
    factor: float = 1.0,
    log_beyond: float = math.inf,
) -> Panel | None:
    """Show one number of every step; unless the axis may be logarithmic, it starts at 0.

    Returns:
        None for a run that does not log it.
    """
    series = bin_series(run.steps, factor * run.column(key))
    if not len(series):
        return None
    include = [] if math.isfinite(log_beyond) else [0.0]
    values = range_of_lines([series], include=include, log_beyond=log_beyond)
    chart = StepChart(
        height=196, steps=steps, values=values, unit=unit, title=f"{title} over steps"
    )
    chart.line(title, series, SINGLE_COLOR, width=1.5)
    if math.isfinite(level) and values.low <= level <= values.high:
        chart.level(level, MUTED, label=f"clipped to {level:g}")
    return Panel(title=title, width=4, cells=(Cell(chart=chart),))


def traffic_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the bytes that all ranks put on the wire for other ranks, by kind."""
    title = "On the wire"
    kinds = {}
    for name, series in _binned_columns(run, "bytes_sent").items():
        if series.high.max() > 0:
            kinds[name] = series
    if not kinds:
        return None
    largest = max(float(series.high.max()) for series in kinds.values())
    power = min(len(BYTE_UNITS) - 1, max(0, math.floor(math.log10(largest) / 3)))
    unit = BYTE_UNITS[power]
    scaled = {name: _divided(series, 1000.0**power) for name, series in kinds.items()}
    chart = StepChart(
        height=180,
        steps=steps,
        values=range_of_lines(scaled.values(), include=[0.0]),
        unit=f"{unit} per step",
        title="Bytes sent over steps",
    )
    legend = []
    for index, (name, series) in enumerate(scaled.items()):
        color = lighten("#1e293b", 0.22 * (index % 4))
        dash = LINE_STYLES[index % len(LINE_STYLES)]
        chart.line(clean(name), series, color, dash=dash, width=1.8)
        text = f"{clean(name, 48)} {series.mean[-1]:.3g} {unit}"
        legend.append(LegendEntry(text=text, color=color, dash=dash))
    return Panel(
        title=title,
        width=4,
        detail="all ranks together",
        legend=tuple(legend),
        cells=(Cell(chart=chart),),
    )


def divergence_panel(run: Run, steps: Range1d, colors: dict[str, str]) -> Panel | None:
    """Show how far the model has gone from the base model on the rows of each source with targets.

    Returns:
        None for a run without targets (`train.kl_targets`).
    """
    lines = _binned_columns(run, "kl_by_source")
    if not lines:
        return None
    shades = source_shades(list(lines), source_languages(run), colors)
    chart = StepChart(
        height=200,
        steps=steps,
        values=range_of_lines(lines.values(), include=[0.0], log_beyond=1000.0),
        unit="nats per predicted token",
        title="Divergence from the base model over steps",
    )
    legend = []
    for name, series in lines.items():
        chart.band(series, shades[name])
        dots = len(series) < FEW_POINTS
        chart.curve(clean(name), series, shades[name], width=1.5, dots=dots)
        text = f"{clean(name, 48)} {series.mean[-1]:.4g}"
        legend.append(LegendEntry(text=text, color=shades[name]))
    return Panel(
        title="Divergence from the base model",
        detail="on rows with targets; 0: as the base model",
        legend=tuple(legend),
        cells=(Cell(chart=chart),),
    )


def _binned_columns(run: Run, key: str) -> dict[str, Series]:
    """Return the entries of a map that every step logs, without those that hold no number."""
    found = {}
    for name, column in run.columns(key).items():
        series = bin_series(run.steps, column)
        if len(series):
            found[name] = series
    return found


def _divided(series: Series, divisor: float) -> Series:
    return Series(
        x=series.x,
        mean=series.mean / divisor,
        low=series.low / divisor,
        high=series.high / divisor,
    )


def starts_panel(run: Run) -> Panel | None:
    """List the starts of a run; None if there was only one."""
    if len(run.starts) < 2:
        return None
    first = max(0, len(run.starts) - MAX_SHOWN_STARTS)
    rows = []
    for index, start in list(enumerate(run.starts))[first:]:
        texts = (
            f"{index + 1:,}",
            moment(start.began),
            f"{start.step:,}",
            moment(start.ended),
            clean(start.how, 160) or "goes on",
        )
        rows.append(TableRow(texts=texts))
    return Panel(
        title="Starts",
        detail=f"the last {len(rows)} of {len(run.starts):,}" if first else "",
        table=Table(headings=("start", "began", "after step", "ended", "how"), rows=tuple(rows)),
    )
