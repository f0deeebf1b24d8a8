"""SVG plots without a library: scales, ticks, and a frame that lines, bands and marks are drawn
into.

Long series are binned before they are drawn: a line through the mean of each bin and a band from
its smallest to its largest value, so that a single spike among 100,000 steps stays visible.
Colours keep their meaning for colour-blind readers (Okabe and Ito 2008; Tol 2021).  All text is
escaped here, once: callers pass plain strings.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAX_POINTS = 600
"""Points of a series that are drawn one by one; a longer series is binned."""

PALETTE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#882255",
    "#999933",
    "#332288",
    "#44aa99",
)
ALARM = "#d55e00"
"""Tolerances and actions; no series has this colour."""
INK = "#1f2937"
MUTED = "#6b7280"
GRID = "#e5e7eb"
DASHES = ("", "6 3", "2 2", "8 3 2 3")
GLYPHS = (
    "M0-6 5.2 3H-5.2Z",
    "M0-6 5 0 0 6-5 0Z",
    "M-4.5-4.5H4.5V4.5H-4.5Z",
    "M0 6 5.2-3H-5.2Z",
    "M-5 0A5 5 0 1 1 5 0Z",
)
"""Shapes of marks around (0, 0): triangle, diamond, square, inverted triangle, half disc."""
MARK_GAP = 7.0
"""Least distance between two marks of one shape, as wide as one of them."""


def clean(value: object, limit: int = 28) -> str:
    """Text for a page: unprintable characters replaced, overlong text cut, HTML escaped."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return html.escape(text if len(text) <= limit else text[: limit - 3] + "...", quote=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points in order of x; where several values share a point, their mean and their range."""

    x: Array
    mean: Array
    low: Array
    high: Array

    def __len__(self) -> int:
        return len(self.x)


def bin_series(x: Array, y: Array, low: Array | None = None, high: Array | None = None) -> Series:
    """Drop what is not finite; average into MAX_POINTS / 2 bins of equal width if there are too
    many points.

    Args:
        x: ascending.
        y: as long as x; NaN where there is no value.
        low, high: an interval around each y, by default y itself; a bin keeps its outermost ends.
    """
    low, high = y if low is None else low, y if high is None else high
    keep = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    x, y, low, high = x[keep], y[keep], low[keep], high[keep]
    if len(x) <= MAX_POINTS:
        return Series(x=x, mean=y, low=low, high=high)
    starts = bin_starts(x, MAX_POINTS // 2)
    sizes = np.diff(np.append(starts, len(x)))
    return Series(
        x=np.add.reduceat(x, starts) / sizes,
        mean=np.add.reduceat(y, starts) / sizes,
        low=np.minimum.reduceat(low, starts),
        high=np.maximum.reduceat(high, starts),
    )


def bin_starts(x: Array, num_bins: int) -> npt.NDArray[np.intp]:
    """Index of the first point of every bin that holds one; bins divide the range of x evenly."""
    if len(x) == 0:
        return np.zeros(0, dtype=np.intp)
    width = (x[-1] - x[0]) / num_bins or 1.0
    bins = np.minimum((x - x[0]) // width, num_bins - 1)
    return np.append(0, np.flatnonzero(np.diff(bins)) + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Values to positions between 0 and 1."""

    low: float
    high: float
    log: bool = False
    given_ticks: tuple[float, ...] = ()
    """Ticks to take in place of round values."""

    def __call__(self, value: Array) -> Array:
        if self.log:
            value = np.log10(np.maximum(value, self.low))
        low, high = (
            (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        )
        return (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the range: steps of 1, 2 or 5 times a power of ten; or
        those given.
        """
        if self.given_ticks:
            return list(self.given_ticks)
        if self.log:
            exponents = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            digits = (1.0,) if len(exponents) > 3 else (1.0, 2.0, 5.0)
            every = max(1, round(len(exponents) / count))
            found = [digit * 10.0**e for e in exponents[::every] for digit in digits]
        else:
            raw = (self.high - self.low) / count
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)
            first = math.ceil(self.low / step - 1e-6)
            found = [n * step for n in range(first, math.floor(self.high / step + 1e-6) + 1)]
        slack = 1e-6 * (self.high - self.low)
        return [value for value in found if self.low - slack <= value <= self.high + slack]


def scale_over(
    values: Sequence[Array], *, include: Sequence[float] = (), log_beyond: float = math.inf
) -> Scale:
    """The range of all values with a little room; logarithmic if the largest is `log_beyond` times
    the smallest.
    """
    everything = np.concatenate([*values, np.asarray(include, dtype=np.float64)])
    if len(everything) == 0:
        return Scale(low=0.0, high=1.0)
    low, high = float(everything.min()), float(everything.max())
    if low > 0 and high > log_beyond * low:
        return Scale(low=low / 1.15, high=high * 1.15, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    starts_at_zero = low == 0.0 and 0.0 in include
    return Scale(low=0.0 if starts_at_zero else low - room, high=high + room)


def step_scale(steps: Array) -> Scale:
    """An axis of whole steps, from 0 unless the log starts much later."""
    if len(steps) == 0:
        return Scale(low=0.0, high=1.0)
    first, last = float(steps.min()), float(steps.max())
    low = 0.0 if first <= max(1.0, 0.05 * last) else first
    return Scale(low=low, high=max(last, low + 1.0))


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick in the notation that suits its axis: 250, 10k, 0.25, 2e-5."""
    largest = max(abs(tick) for tick in ticks)
    if value == 0 or abs(value) < 1e-9 * largest:
        return "0"
    if largest < 0.01:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**exponent:.3g}e{exponent}"
    if abs(value) >= 10_000:
        power = min(4, math.floor(math.log10(abs(value)) / 3 + 1e-9))
        return f"{value / 1000.0**power:.4g}{'kMBT'[power - 1]}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Plot:
    """A frame with axes; every method draws on top of what is there."""

    def __init__(
        self,
        *,
        size: tuple[int, int],
        x: Scale,
        y: Scale,
        labels: tuple[str, str],
        left: int = 60,
        right: int = 12,
    ) -> None:
        self._width, self._height = size
        self._x, self._y = x, y
        self._left, self._right, self._top, self._bottom = left, size[0] - right, 10, size[1] - 34
        self._parts: list[str] = []
        self._axes(*labels)

    def across(self, steps: Array) -> Array:
        """Horizontal positions."""
        return self._left + self._x(steps) * (self._right - self._left)

    def up(self, values: Array) -> Array:
        """Vertical positions."""
        return self._bottom - self._y(values) * (self._bottom - self._top)

    def line(
        self, series: Series, color: str, *, dash: str = "", width: float = 1.6, dots: bool = False
    ) -> None:
        """A line through the means; the range of each bin as a band behind it."""
        if len(series) == 0:
            return
        if np.any(series.high > series.low):
            self.area(series.x, series.low, series.high, color, opacity=0.16)
        across, up = self.across(series.x), self.up(series.mean)
        self._parts.append(
            f'<path d="M{_points(across, up)}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}" stroke-linejoin="round"/>'
        )
        if dots or len(series) == 1:
            spots = "".join(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>'
                for a, b in zip(across, up, strict=True)
            )
            self._parts.append(f'<g fill="{color}">{spots}</g>')

    def area(self, x: Array, low: Array, high: Array, color: str, *, opacity: float = 1.0) -> None:
        """The surface between two curves."""
        across = self.across(x)
        outline = f"M{_points(across, self.up(high))}L{_points(across[::-1], self.up(low)[::-1])}Z"
        border = 'stroke="#fff" stroke-width="0.7"' if opacity == 1 else ""
        self._parts.append(
            f'<path d="{outline}" fill="{color}" fill-opacity="{opacity}" {border}/>'
        )

    def whiskers(self, series: Series, color: str) -> None:
        """The interval of every point as a vertical bar."""
        bars = []
        for x, low, high in zip(
            self.across(series.x), self.up(series.low), self.up(series.high), strict=True
        ):
            bars.append(
                f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6m-6 {high - low:.1f}h6"
            )
        self._parts.append(
            f'<path d="{"".join(bars)}" stroke="{color}" stroke-width="1.2" fill="none"/>'
        )

    def horizontal(self, value: float, color: str, *, dash: str = "5 3", label: str = "") -> None:
        """A level across the whole plot, with a label at its right end."""
        level = float(self.up(np.asarray([value]))[0])
        self._parts.append(
            f'<path d="M{self._left} {level:.1f}H{self._right}" stroke="{color}" stroke-dasharray="{dash}"/>'
        )
        if label:
            below = level + 12 if level - self._top < 14 else level - 4
            self._text(self._right - 3, below, label, anchor="end", color=color)

    def verticals(self, steps: Sequence[float], color: str = MUTED) -> None:
        """Dotted lines at steps where something happened to the whole run."""
        for at in self.across(np.asarray(steps, dtype=np.float64)):
            self._parts.append(
                f'<path d="M{at:.1f} {self._top}V{self._bottom}" stroke="{color}" stroke-dasharray="1 3" fill="none"/>'
            )

    def marks(self, marks: Sequence[tuple[float, int, str]]) -> None:
        """(step, shape, tooltip) along the upper edge; of marks of one shape that would cover each
        other, the first.
        """
        drawn: dict[int, float] = {}
        for step, shape, tooltip in marks:
            at = float(self.across(np.asarray([step]))[0])
            if at - drawn.get(shape, -math.inf) < MARK_GAP:
                continue
            drawn[shape] = at
            self._parts.append(
                f'<path transform="translate({at:.1f} {self._top})" d="{GLYPHS[shape % len(GLYPHS)]}" fill="{ALARM}" '
                f'stroke="#fff" stroke-width="0.8"><title>{clean(tooltip, 200)}</title></path>'
            )

    def right_labels(self, labels: Sequence[tuple[float, str, str]], gap: float = 13.0) -> None:
        """(value, colour, text) beside the right edge, pushed apart until none covers another."""
        order = sorted(labels, key=lambda label: label[0], reverse=True)
        wanted = self.up(np.asarray([value for value, _, _ in order], dtype=np.float64))
        placed: list[float] = []
        for at in wanted:
            placed.append(max(float(at), placed[-1] + gap if placed else self._top + 4.0))
        limit = float(self._bottom)
        for index in reversed(range(len(placed))):
            placed[index] = min(placed[index], limit)
            limit = placed[index] - gap
        for at, middle, (_, color, text) in zip(placed, wanted, order, strict=True):
            self._parts.append(
                f'<path d="M{self._right + 1} {middle:.1f}L{self._right + 9} {at:.1f}h4" stroke="{color}" '
                'stroke-width="2" fill="none"/>'
            )
            self._text(self._right + 16, at + 4, text)

    def svg(self, title: str) -> str:
        """The drawing, for the inside of an HTML page."""
        return (
            f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{clean(title, 200)}">'
            f"{''.join(self._parts)}</svg>"
        )

    def _axes(self, x_label: str, y_label: str) -> None:
        x_ticks = [
            t for t in self._x.ticks(max(2, (self._right - self._left) // 64)) if t == round(t)
        ]
        y_ticks = self._y.ticks(max(2, (self._bottom - self._top) // 29))
        for tick, up in zip(y_ticks, self.up(np.asarray(y_ticks)), strict=True):
            self._parts.append(f'<path d="M{self._left} {up:.1f}H{self._right}" stroke="{GRID}"/>')
            self._text(self._left - 6, up + 4, tick_label(tick, y_ticks), anchor="end")
        for tick, across in zip(x_ticks, self.across(np.asarray(x_ticks)), strict=True):
            self._parts.append(f'<path d="M{across:.1f} {self._bottom}v4" stroke="{MUTED}"/>')
            self._text(across, self._bottom + 15, tick_label(tick, x_ticks), anchor="middle")
        self._parts.append(
            f'<path d="M{self._left} {self._bottom}H{self._right}" stroke="{MUTED}"/>'
        )
        self._text(
            (self._left + self._right) / 2, self._height - 4, x_label, anchor="middle", color=MUTED
        )
        middle = (self._top + self._bottom) / 2
        self._parts.append(
            f'<text transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle" fill="{MUTED}">'
            f"{clean(y_label, 60)}</text>"
        )

    def _text(
        self, x: float, y: float, text: str, *, anchor: str = "start", color: str = INK
    ) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{clean(text, 60)}</text>'
        )


def standalone(body: str, width: int, height: int) -> str:
    """A file of its own from drawings, on white."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )


def _points(across: Array, up: Array) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))


def legend(lines: Sequence[tuple[str, str, str]], marks: Sequence[str] = ()) -> str:
    """An HTML list above a plot: (colour, dash, text) of lines, then names of marks, whose position
    is their shape.
    """
    drawings = [
        (f'<path d="M0 5H20" stroke="{c}" stroke-width="2.4" stroke-dasharray="{d}"/>', t)
        for c, d, t in lines
    ]
    for index, name in enumerate(marks):
        glyph = GLYPHS[index % len(GLYPHS)]
        drawings.append(
            (f'<path transform="translate(10 5) scale(.85)" d="{glyph}" fill="{ALARM}"/>', name)
        )
    entries = (
        f'<li><svg viewBox="0 0 20 10" aria-hidden="true">{drawing}</svg>{clean(text, 60)}</li>'
        for drawing, text in drawings
    )
    return f"<ul>{''.join(entries)}</ul>"


def tint(color: str, share_of_white: float) -> str:
    """A colour mixed with white."""
    channels = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share_of_white):02x}" for c in channels)
