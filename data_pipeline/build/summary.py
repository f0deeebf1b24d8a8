"""The table of a finished build, for people."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.store.manifest import SourceEntry
from data_pipeline.tables import table

_COLUMNS = (
    "source",
    "language",
    "documents",
    "tokens",
    "rows",
    "held out",
    "copies",
    "near copies",
    "contaminated",
    "rejected",
)


def describe_build(entries: Sequence[SourceEntry]) -> str:
    """Return a table of what a build holds and what it turned away."""
    return table(_COLUMNS, [_row(entry) for entry in entries])


def _row(entry: SourceEntry) -> tuple[str, ...]:
    return (
        entry.name,
        entry.language,
        f"{entry.documents:,}",
        _tokens(entry),
        f"{entry.rows:,}",
        f"{entry.held_out_documents:,}",
        f"{entry.duplicates + entry.held_out_copies:,}",
        f"{entry.near_duplicates:,}",
        f"{entry.contaminated:,}",
        _rejects(entry),
    )


def _tokens(entry: SourceEntry) -> str:
    """Return the predicted tokens, and of how many they are if a loss mask left others out."""
    if not entry.has_loss:
        return f"{entry.predicted_tokens:,}"
    return f"{entry.predicted_tokens:,} of {entry.slots:,}"


def _rejects(entry: SourceEntry) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in entry.rejects.items()) or "0"
