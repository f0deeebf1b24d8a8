"""Which documents are held out, which are trained on, and which are exact copies of another.

Decisions
    Everything follows from the content hash of a document, so a copy shares the fate of its
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
    Equal hashes meet in buckets by their leading bits, one bucket in memory at a time, so memory
    does not grow with the corpus except for one byte per document. The hashes themselves may be
    memory maps.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from data_pipeline.store.packing import Integers

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
Hashes = npt.NDArray[np.void]
"""128-bit hashes as an array of HASH_DTYPE."""
Fates = npt.NDArray[np.uint8]
"""A `Fate` per document."""
Mask = npt.NDArray[np.bool_]
BUCKET_DOCUMENTS = 1 << 22
"""Number of documents compared at once, about."""
_HELD_OUT_SALT = b"held out documents 1:"


class Fate(enum.IntEnum):
    """Use of a stored document."""

    TRAIN = 0
    HELD_OUT = 1
    DUPLICATE = 2
    HELD_OUT_COPY = 3
    NEAR_DUPLICATE = 4
    CONTAMINATED = 5


def content_hash(content: bytes) -> int:
    """Return the xxh3_128 of a document's content."""
    return xxhash.xxh3_128_intdigest(content)


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


def held_out_mask(hashes: Hashes, share: float) -> Mask:
    """Return True for the documents to hold out; copies have the fate of their original."""
    if share <= 0 or len(hashes) == 0:
        return np.zeros(len(hashes), dtype=bool)
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    order = _held_out_order(hashes)
    low = order.min()
    high = order.max()
    if low == high:  # a single text
        return np.zeros(len(hashes), dtype=bool)
    mask = order < np.uint64(int(share * 2**64))
    if not mask.any():
        mask = order == low
    if mask.all():
        mask = order != high
    return np.asarray(mask)


def _held_out_order(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """Return 64 fresh bits per document, from its content hash and a constant."""
    digests = (xxhash.xxh3_64_intdigest(_HELD_OUT_SALT + value.tobytes()) for value in hashes)
    return np.fromiter(digests, dtype=np.uint64, count=len(hashes))


def decide_fates(hashes: Sequence[Hashes], shares: Sequence[float]) -> list[SourceFates]:
    """Decide which documents of each source are trained on, held out, or copies.

    Args:
        hashes: Content hashes of each source, in the order of the mix.
        shares: The held_out_share of each source.
    """
    held = [held_out_mask(values, share) for values, share in zip(hashes, shares, strict=True)]
    fates = [np.zeros(len(values), np.uint8) for values in hashes]
    num_documents = sum(len(values) for values in hashes)
    bits = (num_documents // BUCKET_DOCUMENTS).bit_length()
    for bucket in range(1 << bits):
        chosen = [_numbers_in_bucket(values, bucket, bits) for values in hashes]
        bucket_hashes = []
        bucket_held = []
        for source, numbers in enumerate(chosen):
            bucket_hashes.append(hashes[source][numbers])
            bucket_held.append(held[source][numbers])
        found = _bucket_fates(np.concatenate(bucket_hashes), np.concatenate(bucket_held))
        start = 0
        for source, numbers in enumerate(chosen):
            fates[source][numbers] = found[start : start + len(numbers)]
            start += len(numbers)
    return [SourceFates(fates=values) for values in fates]


def _numbers_in_bucket(hashes: Hashes, bucket: int, bits: int) -> Integers:
    if not bits:
        return np.arange(len(hashes))
    return np.flatnonzero(hashes["high"] >> np.uint64(64 - bits) == bucket)


def _bucket_fates(hashes: Hashes, held: Mask) -> Fates:
    """Return the fates of documents in the order of the mix.

    Args:
        hashes: Content hashes of the documents.
        held: Whether the source of each document holds it out.
    """
    fates = np.full(len(hashes), Fate.DUPLICATE, np.uint8)
    if not len(hashes):
        return fates
    # equal hashes become neighbors, in the order of the mix
    order = np.lexsort((np.arange(len(hashes)), hashes["low"], hashes["high"]))
    ordered = hashes[order]
    is_first = np.ones(len(hashes), dtype=bool)
    other_high = ordered["high"][1:] != ordered["high"][:-1]
    other_low = ordered["low"][1:] != ordered["low"][:-1]
    is_first[1:] = other_high | other_low
    starts = np.flatnonzero(is_first)
    groups = np.cumsum(is_first) - 1
    group_held = np.logical_or.reduceat(held[order], starts)
    fates[order[starts]] = Fate.TRAIN
    fates[order[group_held[groups]]] = Fate.HELD_OUT_COPY
    # of each group that is held out, the first one whose own source holds it out is measured
    held_places = np.flatnonzero(held[order])
    _, first_of_group = np.unique(groups[held_places], return_index=True)
    fates[order[held_places[first_of_group]]] = Fate.HELD_OUT
    return fates
