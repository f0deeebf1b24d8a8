"""Numbers over optimizer steps, made small enough to draw, and the ranges of the axes.

A long series is averaged over bins before it is drawn: a line through the mean of each bin, and a
band from its smallest to its largest value, so that a single spike among 100,000 steps stays
visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAX_POINTS = 600
"""Points of a series that are drawn one by one; a longer series is averaged over bins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points in ascending order of x, with mean and range of the values each stands for."""

    x: Array
    mean: Array
    low: Array
    high: Array

    def __len__(self) -> int:
        return len(self.x)


def bin_series(x: Array, y: Array, low: Array | None = None, high: Array | None = None) -> Series:
    """Drop values that are not finite; average over MAX_POINTS / 2 bins if there are too many.

    Args:
        x: Positions in ascending order.
        y: One value for each position; NaN where there is none.
        low: Lower end of an interval around each value, by default the value itself.
        high: Upper end of that interval. A bin keeps its outermost ends.
    """
    if low is None:
        low = y
    if high is None:
        high = y
    keep = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    whole = Series(x=x[keep], mean=y[keep], low=low[keep], high=high[keep])
    if len(whole) <= MAX_POINTS:
        return whole
    starts = bin_starts(whole.x, MAX_POINTS // 2)
    sizes = np.diff(np.append(starts, len(whole)))
    return Series(
        x=np.add.reduceat(whole.x, starts) / sizes,
        mean=np.add.reduceat(whole.mean, starts) / sizes,
        low=np.minimum.reduceat(whole.low, starts),
        high=np.maximum.reduceat(whole.high, starts),
    )


def bin_starts(x: Array, num_bins: int) -> npt.NDArray[np.intp]:
    """Return the index of the first point of every bin that holds one.

    The bins divide the range of x evenly.
    """
    if len(x) == 0:
        return np.zeros(0, dtype=np.intp)
    width = (x[-1] - x[0]) / num_bins or 1.0
    bins = np.minimum((x - x[0]) // width, num_bins - 1)
    return np.append(0, np.flatnonzero(np.diff(bins)) + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisRange:
    """The values between which an axis runs."""

    low: float
    high: float
    log: bool = False
    """Whether the axis is logarithmic."""


def range_over(
    values: Sequence[Array], *, include: Sequence[float] = (), log_beyond: float = math.inf
) -> AxisRange:
    """Return the range of all values with a little room.

    Args:
        values: Finite numbers.
        include: Further values that the axis must show.
        log_beyond: The axis is logarithmic if the largest value is more than so many times the
            smallest, and all are positive.
    """
    everything = np.concatenate([*values, np.asarray(include, dtype=np.float64)])
    if len(everything) == 0:
        return AxisRange(low=0.0, high=1.0)
    low = float(everything.min())
    high = float(everything.max())
    if low > 0 and high > log_beyond * low:
        return AxisRange(low=low / 1.15, high=high * 1.15, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    if low == 0.0 and 0.0 in include:
        return AxisRange(low=0.0, high=high + room)
    return AxisRange(low=low - room, high=high + room)


def range_of_lines(
    lines: Iterable[Series], *, include: Sequence[float] = (), log_beyond: float = math.inf
) -> AxisRange:
    """Return the range of all lines with their bands; the options are those of `range_over`."""
    ends = []
    for line in lines:
        ends += [line.low, line.high]
    return range_over(ends, include=include, log_beyond=log_beyond)


def step_range(steps: Array) -> AxisRange:
    """Return the range of the step axis: from 0, unless the log starts much later."""
    if len(steps) == 0:
        return AxisRange(low=0.0, high=1.0)
    first = float(steps.min())
    last = float(steps.max())
    low = 0.0 if first <= max(1.0, 0.05 * last) else first
    return AxisRange(low=low, high=max(last, low + 1.0))


def log_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Return round numbers between two positive ones: 1, 2, 5, 10, or powers of ten if too many.

    Args:
        low: Lower end of the axis.
        high: Upper end of the axis.
        max_ticks: As many numbers as there is room for.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = []
        for power in powers:
            ticks += [mantissa * 10.0**power for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= max_ticks:
            return ticks
    return ticks[:: math.ceil(len(ticks) / max_ticks)]
