"""Figures as SVG text, drawn by matplotlib in one style: bars, columns, and lines with intervals.

A function that draws returns a `Figure` and wears `@as_svg`, which sets the style, turns the figure
into text, and keeps matplotlib out of everything that does not draw.  Text stays text in the file:
whoever shows it picks a font that has the characters, and the same figure gives the same bytes.
Colors keep their meaning for color-blind readers (Okabe and Ito 2008; Tol 2021); the light ones
among them are darkened to a contrast of 3 on white.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

from data_pipeline.escaping import escaped_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

PALETTE = (
    "#0072b2",
    "#c28200",
    "#009e73",
    "#cc79a7",
    "#3a92cc",
    "#882255",
    "#999933",
    "#332288",
    "#36988a",
)
"""Colors of series, in order."""
ALARM = "#d55e00"
"""Color of limits and of values beyond them; no series has it."""
INK = "#1f2937"
MUTED = "#6b7280"
GRID = "#e5e7eb"
DASHES = ("solid", "dashed", "dotted", "dashdot")
"""Styles that tell lines of one color apart."""

PIXELS_PER_INCH = 96
"""Resolution of a figure on the screen; matplotlib counts in points, 72 to an inch."""
LABEL_GAP = 10.0
"""Least distance in points between the labels at the ends of lines."""
STYLE: dict[Any, Any] = {
    "figure.dpi": 72,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    # a dollar sign in a name is no formula
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.xmargin": 0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "ytick.minor.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gpt-oss-cpt",
}


METADATA = ("Creator", "Date", "Format", "Type")
"""Notes that matplotlib adds to a file; they are left out, so that bytes repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    label: str
    """Written at the right end of the line."""
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = "solid"
    low: Sequence[float] | None = None
    """Lower ends of intervals around y; with `high`, they are drawn as a band."""
    high: Sequence[float] | None = None
    dots: bool = True
    """Whether each point is marked."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    text: str
    """Shown behind the bar."""
    mark: float | None = None
    """A limit or target, drawn as a tick."""
    alarm: bool = False
    """Drawn in the color of alarms."""


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Decorate a function that draws, so that it returns the figure as the text of an SVG file."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # the font that measures text lacks Japanese; the one that shows it is the reader's
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = draw(*args, **kwargs)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata=dict.fromkeys(METADATA))
        return escaped_text(file.getvalue())

    return drawn


def inline(svg: str) -> str:
    """Return an SVG file as an element for the inside of an HTML page."""
    return svg[svg.index("<svg") :]


def new_figure(
    width: int,
    height: int,
    *,
    rows: int = 1,
    columns: int = 1,
    title: str = "",
    source: str = "",
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its charts, row by row.

    Args:
        width: Of the figure, in pixels.
        height: Of the figure, in pixels.
        rows: Charts above each other.
        columns: Charts side by side.
        title: Heading of the whole figure.
        source: Small print below it: where the figures come from.
        height_ratios: Relative heights of the rows.
    """
    from matplotlib.figure import Figure

    size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    if source:
        figure.supxlabel(source, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure, list(grid.flat)


def use_log_scales(axes: Axes, x_ticks: Sequence[float], x_labels: Sequence[str]) -> None:
    """Make both axes logarithmic, with the given ticks on x and round numbers on y."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(x_ticks, x_labels)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    *,
    title: str = "",
    x_label: str,
    y_label: str,
    from_zero: bool = False,
) -> None:
    """Draw lines with their intervals, each labeled at its right end.

    Args:
        axes: Where to draw; its scales must be set before, since they place the labels.
        lines: What to draw.
        title: Heading of the chart.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        from_zero: Start the vertical axis at 0.
    """
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    for line in lines:
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.16, lw=0)
        marker = "o" if line.dots else ""
        style: dict[str, Any] = {"color": line.color, "linestyle": line.dash, "lw": 1.6}
        axes.plot(line.x, line.y, marker=marker, markersize=3.5, clip_on=False, **style)
    if from_zero:
        axes.set_ylim(bottom=0)
    _label_ends(axes, lines)


def draw_level(
    axes: Axes, value: float, color: str, *, dash: str = "solid", label: str = ""
) -> None:
    """Draw a level across a whole chart, with a label above its right end."""
    axes.axhline(value, color=color, linestyle=dash, lw=1)
    axes.annotate(
        label,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 3),
        textcoords="offset points",
        ha="right",
        color=color,
    )


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each label beside the end of its line, moved until none covers another."""
    # only a laid out figure knows where a value lies
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    ends = [(float(to_pixels((line.x[-1], line.y[-1]))[1]), line) for line in lines]
    ends.sort(key=lambda end: end[0], reverse=True)
    heights = [height for height, _ in ends]
    placed = spread(heights, LABEL_GAP, lowest=float(axes.bbox.y0))
    for (height, line), label_height in zip(ends, placed, strict=True):
        axes.annotate(
            line.label,
            (line.x[-1], line.y[-1]),
            xytext=(14, label_height - height),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.color,
                "lw": 1.5,
                # from the end of the line to the left edge of the text
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )


def spread(heights: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Move heights down until they are `gap` apart, then up again where they fall below `lowest`.

    Args:
        heights: In descending order.
        gap: Least distance between two of them.
        lowest: Where the last may stand.
    """
    placed: list[float] = []
    for height in heights:
        free = placed[-1] - gap if placed else height
        placed.append(min(height, free))
    for index in reversed(range(len(placed))):
        placed[index] = max(placed[index], lowest)
        lowest = placed[index] + gap
    return placed


def draw_bars(axes: Axes, title: str, bars: Sequence[Bar], *, room_for: int = 0) -> None:
    """Draw horizontal bars from top to bottom, all on one scale that starts at 0.

    Args:
        axes: Where to draw.
        title: Heading of the chart.
        bars: The bars from top to bottom.
        room_for: Leave room for at least so many bars, so that a few are not drawn thicker.
    """
    axes.set_title(title)
    positions = range(len(bars))
    colors = [ALARM if bar.alarm else PALETTE[0] for bar in bars]
    drawn = axes.barh(positions, [bar.value for bar in bars], height=0.7, color=colors)
    axes.bar_label(drawn, [bar.text for bar in bars], padding=5)
    for position, bar in zip(positions, bars, strict=True):
        if bar.mark is not None:
            axes.plot([bar.mark, bar.mark], [position - 0.42, position + 0.42], color=INK, lw=2)
    widest = max((max(bar.value, bar.mark or 0.0) for bar in bars), default=0.0)
    axes.set_xlim(0, 1.15 * widest or 1.0)
    axes.set_ylim(max(len(bars), room_for, 1) - 0.5, -0.5)
    axes.set_yticks(positions, [bar.label for bar in bars])
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def draw_columns(axes: Axes, title: str, counts: Sequence[int], labels: Sequence[str]) -> None:
    """Draw a histogram; each label names the lower edge of its column."""
    axes.set_title(title)
    axes.bar(range(len(counts)), counts, width=0.9, align="edge", color=PALETTE[0])
    axes.set_xticks(range(0, len(labels), 3), labels[::3])
    axes.set_yticks([max(counts, default=0) or 1])
    axes.yaxis.set_major_formatter("{x:,.0f}")
