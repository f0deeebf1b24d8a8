"""Tables for terminals; a cell may hold a text from outside."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.escaping import escaped_line


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns side by side: text to the left, numbers to the right.

    A column holds numbers if every cell below its header starts with a digit or a sign.
    """
    rows = [[escaped_line(cell) for cell in row] for row in rows]
    is_number = [all(map(_starts_like_a_number, column)) for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = []
        for cell, width, to_the_right in zip(row, widths, is_number, strict=True):
            cells.append(cell.rjust(width) if to_the_right else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _starts_like_a_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "+-"
