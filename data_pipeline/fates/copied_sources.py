"""Sources that are mostly copies of another one, by name and figure.

Decisions
    Nothing is looked up unless more than MIN_COPIED_SHARE of a source's documents were dropped as
    copies. Then some of the exact copies are looked up in all other sources by their hash, and the
    share is extrapolated. Of near copies the search for them has counted whose they are.
    A copied source is no reason to refuse a mix, because two dumps of the web may share most of
    their text; that nothing of it is left is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.deduplication import Fate
from data_pipeline.parts.part import read_copy_hashes
from data_pipeline.store.packing import Integers

MIN_COPIED_SHARE = 0.5
"""Share of a source's documents above which it is told whose copies they are."""
_MAX_EXACT = 10_000
"""Exact copies that are looked up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedSource:
    """A source that is mostly copies of another one."""

    name: str
    """Name of the source."""
    original: str
    """Source that has the most of its documents."""
    copies: int
    """Documents of it that the other one has, exactly or nearly."""
    documents: int
    """All its documents, each content once."""

    def describe(self) -> str:
        """Return what was found, in a sentence."""
        return (
            f"source '{self.name}' copies source '{self.original}': {self.copies:,} of "
            f"{self.documents:,} documents are copies or near copies of documents of "
            f"'{self.original}' and were dropped. Remove one of the two, or lower its weight."
        )


def find_copied_sources(sources: Sequence[DecidedSource]) -> list[CopiedSource]:
    """Return which of the sources of a mix are mostly copies of another one."""
    found = []
    for number, source in enumerate(sources):
        num_documents = len(source.fates.fates)
        exact = np.flatnonzero(np.isin(source.fates.fates, [Fate.DUPLICATE, Fate.HELD_OUT_COPY]))
        if len(exact) + source.fates.count(Fate.NEAR_DUPLICATE) <= MIN_COPIED_SHARE * num_documents:
            continue
        copies = _exact_copies(sources, number, exact)
        if source.near_copies_of:
            copies += np.array(source.near_copies_of)
        for other, original in enumerate(sources):
            # copies within a source, and text that is there to be measured, are another matter
            if other == number or original.parts.source.held_out_share >= 1:
                copies[other] = 0
        best = int(np.argmax(copies))
        if copies[best] > MIN_COPIED_SHARE * num_documents:
            found.append(
                CopiedSource(
                    name=source.parts.source.name,
                    original=sources[best].parts.source.name,
                    copies=round(float(copies[best])),
                    documents=num_documents,
                )
            )
    return found


def _some(numbers: Integers, limit: int) -> Integers:
    """Return at most `limit` of the numbers, evenly spread."""
    return numbers[:: max(-(-len(numbers) // limit), 1)]


def _exact_copies(
    sources: Sequence[DecidedSource], number: int, copies: Integers
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return how many of the copies each source has, about, [sources]."""
    chosen = _some(copies, _MAX_EXACT)
    wanted = sources[number].parts.copy_hashes_of(chosen)["high"]
    found = np.zeros(len(sources))
    for other, source in enumerate(sources):
        if other == number:
            continue
        has = np.zeros(len(wanted), dtype=bool)
        for part in source.parts.parts:
            has |= np.isin(wanted, read_copy_hashes(part)["high"])
        found[other] = has.sum() * len(copies) / max(len(chosen), 1)
    return found
