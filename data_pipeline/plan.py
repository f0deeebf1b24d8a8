"""What a run will draw from each source, computed with the very function that training uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipeline.dataset import BuiltData
from data_pipeline.ledger import Ledger
from data_pipeline.manifest import SourceEntry
from data_pipeline.mixture import Mixture
from data_pipeline.schema import MixConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """One source over a whole run."""

    name: str
    language: str
    documents: int
    """Documents to train on."""
    tokens: int
    """Predicted tokens in one epoch."""
    rows: int
    """Rows in one epoch."""
    drawn_tokens: int
    """Predicted tokens that the run takes."""
    epochs: float
    """Rows drawn per row there is."""
    share: float
    """Of the run's predicted tokens, 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run over a built mix."""

    steps: int
    global_batch_size: int
    """Packed rows per step."""
    sources: tuple[PlannedSource, ...]
    problems: tuple[str, ...]
    """Why the run cannot be done; empty if it can."""

    def language_shares(self) -> dict[str, float]:
        """Share of the predicted tokens by language, 0 to 1."""
        shares: dict[str, float] = {}
        for source in self.sources:
            shares[source.language] = shares.get(source.language, 0.0) + source.share
        return shares

    def describe(self) -> str:
        """A table for people."""
        tokens = sum(source.drawn_tokens for source in self.sources)
        header = ("source", "language", "documents", "tokens", "rows", "drawn tokens", "share", "epochs")
        rows = [
            (
                *(s.name, s.language, f"{s.documents:,}", f"{s.tokens:,}", f"{s.rows:,}", f"{s.drawn_tokens:,}"),
                *(f"{s.share:.2%}", f"{s.epochs:.2f}"),
            )
            for s in self.sources
        ]
        languages = ", ".join(f"{name} {share:.2%}" for name, share in self.language_shares().items())
        return "\n".join(
            [
                table(header, rows),
                f"{self.steps:,} steps of {self.global_batch_size:,} rows: {tokens:,} predicted tokens; {languages}",
            ]
        )


def make_plan(built: BuiltData, mix: MixConfig, steps: int, global_batch_size: int) -> Plan:
    """Draw `steps` steps without reading a token."""
    ledger = Ledger.start(mix)
    end = Mixture(built, ledger, mix.seed).position(steps, global_batch_size)
    total = max(sum(end.segment_tokens), 1)
    documents = {entry.name: entry.documents for entry in built.manifest.sources}
    sources, problems = [], []
    for number, (source, config) in enumerate(zip(built.source_names, mix.sources, strict=True)):
        rows = built.num_rows(number)
        epochs = end.drawn_rows[number] / max(rows, 1)
        sources.append(
            PlannedSource(
                name=source,
                language=built.languages[number],
                documents=documents[source],
                tokens=int(built.row_tokens(number).sum()),
                rows=rows,
                drawn_tokens=end.segment_tokens[number],
                epochs=epochs,
                share=end.segment_tokens[number] / total,
            )
        )
        if config.max_epochs is not None and epochs > config.max_epochs:
            problems.append(
                f"source '{source}': {steps} steps take {epochs:.2f} epochs, max_epochs is {config.max_epochs:g}. "
                "Train fewer steps, add data, lower its weight, or raise max_epochs."
            )
    return Plan(steps=steps, global_batch_size=global_batch_size, sources=tuple(sources), problems=tuple(problems))


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def _rejects(entry: SourceEntry) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in entry.rejects.items()) or "0"
