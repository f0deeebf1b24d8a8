"""Bars and lines as SVG text: enough for a report, and one dependency less."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

COLOURS = (
    "#2b6cb0",
    "#c05621",
    "#2f855a",
    "#6b46c1",
    "#b7791f",
    "#97266d",
    "#2c7a7b",
    "#4a5568",
    "#9b2c2c",
    "#553c9a",
)
_FONT = 'font-family="sans-serif" font-size="12"'
_LABEL_WIDTH, _VALUE_WIDTH, _BAR_HEIGHT = 170, 90, 22


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """One bar; all lengths are shares of the widest."""

    label: str
    value: float
    text: str
    """Shown behind the bar."""
    mark: float | None = None
    """A limit or target, drawn as a tick."""
    alarm: bool = False
    """Drawn in red."""


def bars(title: str, items: Sequence[Bar], width: int = 640) -> str:
    """Horizontal bars, as an SVG element."""
    longest = max((max(item.value, item.mark or 0) for item in items), default=0) or 1
    room = width - _LABEL_WIDTH - _VALUE_WIDTH
    rows = []
    for number, item in enumerate(items):
        top = 30 + number * _BAR_HEIGHT
        length = room * item.value / longest
        colour = "#c53030" if item.alarm else COLOURS[0]
        rows.append(
            f'<text x="{_LABEL_WIDTH - 8}" y="{top + 13}" text-anchor="end">{html.escape(item.label)}</text>'
            f'<rect x="{_LABEL_WIDTH}" y="{top}" width="{length:.1f}" height="{_BAR_HEIGHT - 6}" fill="{colour}"/>'
            f'<text x="{_LABEL_WIDTH + length + 6:.1f}" y="{top + 13}">{html.escape(item.text)}</text>'
        )
        if item.mark is not None:
            x = _LABEL_WIDTH + room * item.mark / longest
            rows.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{top + _BAR_HEIGHT - 4}" stroke="#1a202c" '
                'stroke-width="2"/>'
            )
    return _svg(title, width, 40 + len(items) * _BAR_HEIGHT, "".join(rows))


def columns(title: str, counts: Sequence[int], labels: Sequence[str], width: int = 400) -> str:
    """A histogram, as an SVG element; `labels` name the lower edge of each column."""
    height, left, bottom = 190, 20, 150
    most, step = max(counts, default=0) or 1, (width - 2 * left) / max(len(counts), 1)
    parts = []
    for number, count in enumerate(counts):
        x, tall = left + number * step, 110 * count / most
        parts.append(
            f'<rect x="{x:.1f}" y="{bottom - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" fill="{COLOURS[0]}">'
            f"<title>{html.escape(labels[number])}: {count:,}</title></rect>"
        )
        if number % 3 == 0:
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16}">{html.escape(labels[number])}</text>'
            )
    parts.append(f'<text x="{left}" y="36" fill="#4a5568">most: {most:,}</text>')
    return _svg(title, width, height, "".join(parts))


def lines(
    title: str,
    x: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    x_name: str,
    y_name: str,
) -> str:
    """Lines over a common axis, as an SVG element."""
    width, height, left, top, right, bottom = 760, 360, 60, 40, 190, 50
    high = max((max(values) for _, values in series), default=0) or 1
    wide = max(x, default=0) or 1
    inner_w, inner_h = width - left - right, height - top - bottom
    parts = []
    for tick in _ticks(high):
        y = top + inner_h * (1 - tick / high)
        parts.append(
            f'<line x1="{left}" x2="{left + inner_w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(wide):
        at = left + inner_w * tick / wide
        parts.append(
            f'<text x="{at:.1f}" y="{top + inner_h + 18}" text-anchor="middle">{tick:,.0f}</text>'
        )
    for number, (name, values) in enumerate(series):
        colour, dash = (
            COLOURS[number % len(COLOURS)],
            ' stroke-dasharray="6 3"' if number >= len(COLOURS) else "",
        )
        points = " ".join(
            f"{left + inner_w * a / wide:.1f},{top + inner_h * (1 - b / high):.1f}"
            for a, b in zip(x, values, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        y = top + 16 * number + 8
        parts.append(
            f'<line x1="{left + inner_w + 14}" x2="{left + inner_w + 34}" y1="{y}" y2="{y}" stroke="{colour}" '
            f'stroke-width="2"{dash}/><text x="{left + inner_w + 40}" y="{y + 4}">{html.escape(name)}</text>'
        )
    parts.append(
        f'<text x="{left + inner_w / 2}" y="{height - 10}" text-anchor="middle">{html.escape(x_name)}</text>'
        f'<text x="{left}" y="{top - 8}" fill="#4a5568">{html.escape(y_name)}</text>'
    )
    return _svg(title, width, max(height, top + 16 * len(series) + 20), "".join(parts))


def stack(parts: Sequence[str], width: int = 780) -> str:
    """Several SVG elements below each other, as one file."""
    placed, top = [], 0
    for part in parts:
        height = int(part.split('height="', 1)[1].split('"', 1)[0])
        placed.append(f'<g transform="translate(10,{top + 10})">{part}</g>')
        top += height + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}"><rect width="100%" height="100%" '
        f'fill="white"/>{"".join(placed)}</svg>\n'
    )


def _ticks(high: float) -> list[float]:
    """0 and up to five round numbers up to `high`."""
    step = 10 ** math.floor(math.log10(high))
    for factor in (0.2, 0.5, 1, 2):
        if high / (step * factor) <= 5:
            step *= factor
            break
    return [step * number for number in range(int(high / step + 1e-9) + 1)]


def _svg(title: str, width: int, height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT} fill="#1a202c">'
        f'<text x="10" y="16" font-weight="bold">{html.escape(title)}</text>{body}</svg>'
    )
