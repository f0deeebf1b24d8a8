"""Which documents are held out, which are trained on, and which are copies of another.

Decisions
    Everything follows from the content hash of a document, so a copy shares the fate of its
    original, wherever it stands and however often.  Stages, in order of precedence:
      1. held out: the hash falls below the source's held_out_share.  The choice depends on the text
      alone: not on
         order, other documents, the seed or the epoch.  The first source in the mix that holds a
         text out keeps it.
      2. never trained: a text that any source holds out is dropped from the training documents of
      all sources.
      3. duplicate: of equal texts the first one, in the order of the mix, is trained on.
    A source of at least two documents that is to hold some out holds out at least one and keeps at
    least one: if the hash would not have it so, the documents with the smallest or the largest hash
    move. Equal hashes meet in buckets by their leading bits, one bucket in memory at a time, so
    memory does not grow with the corpus but for one byte a document; the hashes themselves may be
    memory maps.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

_HELD_OUT_SALT = b"held out documents 1:"
HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
Hashes = npt.NDArray[np.void]
Indices = npt.NDArray[np.int64]
BUCKET_DOCUMENTS = 1 << 22
"""Documents compared at once, about."""


class Fate(enum.IntEnum):
    """What becomes of a stored document."""

    TRAIN = 0
    HELD_OUT = 1
    DUPLICATE = 2
    HELD_OUT_COPY = 3
    NEAR_DUPLICATE = 4
    CONTAMINATED = 5


Fates = npt.NDArray[np.uint8]


def content_hash(content: bytes) -> int:
    """xxh3_128 of a document's bytes."""
    return xxhash.xxh3_128_intdigest(content)


def as_array(hashes: Sequence[int]) -> Hashes:
    """128-bit integers as an array of (high, low)."""
    mask = 2**64 - 1
    return np.array([(value >> 64, value & mask) for value in hashes], dtype=HASH_DTYPE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceFates:
    """What becomes of the stored documents of one source."""

    fates: Fates
    """A `Fate` per document."""

    def numbers(self, fate: Fate) -> Indices:
        """Document numbers with a fate, in ascending order."""
        return np.flatnonzero(self.fates == fate).astype(np.int64)

    def count(self, fate: Fate) -> int:
        """Documents with a fate."""
        return int(np.count_nonzero(self.fates == fate))

    @property
    def train(self) -> Indices:
        """Documents to train on."""
        return self.numbers(Fate.TRAIN)

    @property
    def held_out(self) -> Indices:
        """Documents to measure."""
        return self.numbers(Fate.HELD_OUT)

    @property
    def num_duplicates(self) -> int:
        """Documents that stand earlier in the mix, too."""
        return self.count(Fate.DUPLICATE)

    @property
    def num_held_out_copies(self) -> int:
        """Documents dropped because their text is held out elsewhere."""
        return self.count(Fate.HELD_OUT_COPY)


def held_out_mask(hashes: Hashes, share: float) -> npt.NDArray[np.bool_]:
    """True for the documents to hold out; copies have the fate of their original."""
    if share <= 0 or len(hashes) == 0:
        return np.zeros(len(hashes), dtype=bool)
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    order = _held_out_order(hashes)
    low, high = order.min(), order.max()
    if low == high:  # a single text
        return np.zeros(len(hashes), dtype=bool)
    mask = order < np.uint64(int(share * 2**64))
    if not mask.any():
        mask = order == low
    if mask.all():
        mask = order != high
    return np.asarray(mask)


def decide_fates(hashes: Sequence[Hashes], shares: Sequence[float]) -> list[SourceFates]:
    """Assign the documents of every source.

    Args:
        hashes: content hashes per source, in the order of the mix.
        shares: held_out_share per source.
    """
    held = [held_out_mask(values, share) for values, share in zip(hashes, shares, strict=True)]
    fates = [np.zeros(len(values), np.uint8) for values in hashes]
    bits = max(0, (sum(map(len, hashes)) // BUCKET_DOCUMENTS).bit_length())
    for bucket in range(1 << bits):
        chosen = [_in_bucket(values, bucket, bits) for values in hashes]
        keys = np.concatenate(
            [values[numbers] for values, numbers in zip(hashes, chosen, strict=True)]
        )
        flags = np.concatenate([mask[numbers] for mask, numbers in zip(held, chosen, strict=True)])
        found = _fates(keys, flags)
        ends = np.cumsum([len(numbers) for numbers in chosen])[:-1]
        for source, part in enumerate(np.split(found, ends)):
            fates[source][chosen[source]] = part
    return [SourceFates(fates=values) for values in fates]


def _in_bucket(hashes: Hashes, bucket: int, bits: int) -> Indices:
    if not bits:
        return np.arange(len(hashes))
    return np.flatnonzero(hashes["high"] >> np.uint64(64 - bits) == bucket)


def _fates(keys: Hashes, held: npt.NDArray[np.bool_]) -> Fates:
    """Fates of documents in the order of the mix; `held` marks those whose source holds them
    out.
    """
    fates = np.full(len(keys), Fate.DUPLICATE, np.uint8)
    if not len(keys):
        return fates
    order = np.lexsort((np.arange(len(keys)), keys["low"], keys["high"]))
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (
        ordered["low"][1:] != ordered["low"][:-1]
    )
    starts = np.flatnonzero(new)
    groups = np.cumsum(new) - 1
    group_held = np.logical_or.reduceat(held[order], starts)
    fates[order[starts]] = Fate.TRAIN
    fates[order[group_held[groups]]] = Fate.HELD_OUT_COPY
    held_places = np.flatnonzero(held[order])
    _, first = np.unique(groups[held_places], return_index=True)
    fates[order[held_places[first]]] = Fate.HELD_OUT
    return fates


def _held_out_order(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """64 fresh bits per document, from its content hash and a constant."""
    digests = (xxhash.xxh3_64_intdigest(_HELD_OUT_SALT + value.tobytes()) for value in hashes)
    return np.fromiter(digests, dtype=np.uint64, count=len(hashes))
