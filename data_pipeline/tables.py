"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.store.manifest import SourceEntry


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(cell[:1].isdigit() or cell[:1] in "+-" for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def describe_build(entries: Sequence[SourceEntry]) -> str:
    """A table of what a build holds and what it turned away."""
    header = ("source", "language", "documents", "tokens", "rows", "held out", "copies", "near copies", "contaminated")
    rows = [
        (
            *(e.name, e.language, f"{e.documents:,}", f"{e.predicted_tokens:,}", f"{e.rows:,}"),
            *(f"{e.held_out_documents:,}", f"{e.duplicates + e.held_out_copies:,}", f"{e.near_duplicates:,}"),
            *(f"{e.contaminated:,}", _rejects(e)),
        )
        for e in entries
    ]
    return table((*header, "rejected"), rows)


def _rejects(entry: SourceEntry) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in entry.rejects.items()) or "0"
