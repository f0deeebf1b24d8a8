"""The table of a finished build."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.store.manifest import SourceEntry
from data_pipeline.tables import table


def describe_build(entries: Sequence[SourceEntry]) -> str:
    """A table of what a build holds and what it turned away."""
    header = (
        "source",
        "language",
        "documents",
        "tokens",
        "rows",
        "held out",
        "copies",
        "near copies",
        "contaminated",
    )
    rows = [
        (
            *(e.name, e.language, f"{e.documents:,}", f"{e.predicted_tokens:,}", f"{e.rows:,}"),
            *(
                f"{e.held_out_documents:,}",
                f"{e.duplicates + e.held_out_copies:,}",
                f"{e.near_duplicates:,}",
            ),
            *(f"{e.contaminated:,}", _rejects(e)),
        )
        for e in entries
    ]
    return table((*header, "rejected"), rows)


def _rejects(entry: SourceEntry) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in entry.rejects.items()) or "0"
