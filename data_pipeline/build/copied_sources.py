"""Sources that are mostly copies of another one, by name and figure.

Decisions
    Nothing is compared unless more than MIN_COPIED_SHARE of a source's documents were dropped as
    copies. Then some of these are looked up in all other sources, and the share is extrapolated:
    exact copies by their hash, near copies by their signature.
    A copied source is no reason to refuse a mix, because two dumps of the web may share most of
    their text; that nothing of it is left is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.build.decided_source import DecidedSource
from data_pipeline.build.deduplication import Fate
from data_pipeline.build.part import read_hashes, read_signatures
from data_pipeline.store.packing import Integers

MIN_COPIED_SHARE = 0.5
"""Share of a source's documents above which it is told whose copies they are."""
_MAX_EXACT = 10_000
"""Exact copies that are looked up."""
_MAX_NEAR = 64
"""Near copies that are looked up, each against every signature."""
_CHUNK = 1024


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


def find_copied_sources(sources: Sequence[DecidedSource], threshold: float) -> list[CopiedSource]:
    """Return the sources that are mostly copies of another one.

    Args:
        sources: All sources, decided.
        threshold: Share of a signature from which on documents are near copies; 0 for none.
    """
    found = []
    for number, source in enumerate(sources):
        num_documents = len(source.fates.fates)
        exact = np.flatnonzero(np.isin(source.fates.fates, [Fate.DUPLICATE, Fate.HELD_OUT_COPY]))
        near = source.fates.numbers(Fate.NEAR_DUPLICATE)
        if len(exact) + len(near) <= MIN_COPIED_SHARE * num_documents:
            continue
        copies = _exact_copies(sources, number, exact)
        if threshold > 0 and not source.parts.is_mock:
            copies += _near_copies(sources, number, near, threshold)
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
    wanted = sources[number].parts.hashes_of(chosen)["high"]
    found = np.zeros(len(sources))
    for other, source in enumerate(sources):
        if other == number:
            continue
        has = np.zeros(len(wanted), dtype=bool)
        for part in source.parts.parts:
            has |= np.isin(wanted, read_hashes(part)["high"])
        found[other] = has.sum() * len(copies) / max(len(chosen), 1)
    return found


def _near_copies(
    sources: Sequence[DecidedSource], number: int, copies: Integers, threshold: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return how many of the near copies each source has the like of, about, [sources]."""
    chosen = _some(copies, _MAX_NEAR)
    found = np.zeros(len(sources))
    if not len(chosen):
        return found
    wanted = sources[number].parts.signatures_of(chosen)
    for other, source in enumerate(sources):
        if other == number or source.parts.is_mock:
            continue
        has = np.zeros(len(wanted), dtype=bool)
        for part in source.parts.parts:
            signatures = read_signatures(part)
            for first in range(0, len(signatures), _CHUNK):
                chunk = signatures[first : first + _CHUNK, None]
                has |= ((chunk == wanted).mean(axis=2) >= threshold).any(axis=0)
        found[other] = has.sum() * len(copies) / len(chosen)
    return found
