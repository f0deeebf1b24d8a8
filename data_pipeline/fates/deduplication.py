"""Which documents are held out, which are trained on, and which are exact copies of another.

Decisions
    Everything follows from hashes of a document's content, so a copy shares the fate of its
    original, wherever it stands and however often. Stages, in order of precedence:
      1. Held out: the hash falls below the source's held_out_share. The choice depends on the text
         alone, not on the order, other documents, the seed or the epoch. The first source in the
         mix that holds a text out keeps it.
      2. Never trained on: a text that any source holds out is dropped from the training documents
         of all sources.
      3. Duplicate: of equal texts the first one, in the order of the mix, is trained on.
    A source of at least two different documents that is to hold some out holds out at least one and
    keeps at least one. If the hashes would not have it so, the documents with the smallest or the
    largest hash move.
    `exact_copies` carries these rules out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.store.packing import Integers

Fates = npt.NDArray[np.uint8]
"""A `Fate` per document."""
Mask = npt.NDArray[np.bool_]


class Fate(enum.IntEnum):
    """Use of a stored document."""

    TRAIN = 0
    HELD_OUT = 1
    DUPLICATE = 2
    HELD_OUT_COPY = 3
    NEAR_DUPLICATE = 4
    CONTAMINATED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFates:
    """Uses of the stored documents of one source."""

    fates: Fates
    """Fate of each document."""

    def numbers(self, fate: Fate) -> Integers:
        """Return the numbers of the documents with a fate, in ascending order."""
        return np.flatnonzero(self.fates == fate).astype(np.int64)

    def count(self, fate: Fate) -> int:
        """Return the number of documents with a fate."""
        return int(np.count_nonzero(self.fates == fate))

    @property
    def train(self) -> Integers:
        """Numbers of the documents to train on."""
        return self.numbers(Fate.TRAIN)

    @property
    def held_out(self) -> Integers:
        """Numbers of the documents to measure."""
        return self.numbers(Fate.HELD_OUT)

    @property
    def num_duplicates(self) -> int:
        """Number of documents that also stand earlier in the mix."""
        return self.count(Fate.DUPLICATE)

    @property
    def num_held_out_copies(self) -> int:
        """Number of documents dropped because their text is held out elsewhere."""
        return self.count(Fate.HELD_OUT_COPY)


def held_out_digests(low: int, high: int, share: float) -> tuple[int, int]:
    """Return the range of digests whose documents a source holds out, both ends included.

    A document has a digest of 64 bits, which depends on its text alone.

    Args:
        low: Smallest digest of the source's documents.
        high: Largest one.
        share: Its held_out_share, above 0 and below 1.

    Returns:
        (first, last); first is above last if none is held out.
    """
    if low == high:  # a single text
        return 1, 0
    end = int(share * 2**64)
    if low >= end:
        return low, low
    if high < end:
        return 0, high - 1
    return 0, end - 1
