"""Which documents are held out, which are trained on, and which are copies of another.

Decisions
    Everything follows from the content hash of a document, so a copy shares the fate of its original, wherever it
    stands and however often.  Stages, in order of precedence:
      1. held out: the hash falls below the source's held_out_share.  The choice depends on the text alone: not on
         order, other documents, the seed or the epoch.  The first source in the mix that holds a text out keeps it.
      2. never trained: a text that any source holds out is dropped from the training documents of all sources.
      3. duplicate: of equal texts the first one, in the order of the mix, is trained on.
    A source of at least two documents that is to hold some out holds out at least one and keeps at least one: if the
    hash would not have it so, the documents with the smallest or the largest hash move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

_HELD_OUT_SALT = b"held out documents 1:"
HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
Hashes = npt.NDArray[np.void]
Indices = npt.NDArray[np.int64]


def content_hash(content: bytes) -> int:
    """xxh3_128 of a document's bytes."""
    return xxhash.xxh3_128_intdigest(content)


def as_array(hashes: Sequence[int]) -> Hashes:
    """128-bit integers as an array of (high, low)."""
    mask = 2**64 - 1
    return np.array([(value >> 64, value & mask) for value in hashes], dtype=HASH_DTYPE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What becomes of the stored documents of one source, as document numbers in ascending order."""

    train: Indices
    held_out: Indices
    num_duplicates: int
    """Documents that another source of the mix already has."""
    num_held_out_copies: int
    """Documents dropped because their text is held out elsewhere."""


def held_out_mask(hashes: Hashes, share: float) -> npt.NDArray[np.bool_]:
    """True for the documents to hold out, of a source without duplicates."""
    order = _held_out_order(hashes)
    if share <= 0 or len(hashes) == 0 or (share < 1 and len(hashes) < 2):
        return np.zeros(len(hashes), dtype=bool)
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    mask = order < np.uint64(int(share * 2**64))
    if not mask.any():
        mask[order.argmin()] = True
    if mask.all():
        mask[order.argmax()] = False
    return mask


def assign(hashes: Sequence[Hashes], shares: Sequence[float]) -> list[Assignment]:
    """Assign the documents of every source; within one source all hashes must differ.

    Args:
        hashes: content hashes per source, in the order of the mix.
        shares: held_out_share per source.
    """
    held_masks = [held_out_mask(values, share) for values, share in zip(hashes, shares, strict=True)]
    held_out: set[bytes] = set()
    trained: set[bytes] = set()
    kept_by_source = []
    for values, mask in zip(hashes, held_masks, strict=True):
        keys = [value.tobytes() for value in values]
        kept = [number for number in np.flatnonzero(mask) if keys[number] not in held_out]
        held_out.update(keys[number] for number in kept)
        kept_by_source.append(np.array(kept, dtype=np.int64))
    assignments = []
    for values, kept_numbers in zip(hashes, kept_by_source, strict=True):
        keys = [value.tobytes() for value in values]
        free = [number for number in range(len(keys)) if keys[number] not in held_out]
        train = [number for number in free if keys[number] not in trained]
        trained.update(keys[number] for number in train)
        assignments.append(
            Assignment(
                train=np.array(train, dtype=np.int64),
                held_out=kept_numbers,
                num_duplicates=len(free) - len(train),
                num_held_out_copies=len(keys) - len(free) - len(kept_numbers),
            )
        )
    return assignments


def _held_out_order(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """64 fresh bits per document, from its content hash and a constant."""
    digests = (xxhash.xxh3_64_intdigest(_HELD_OUT_SALT + value.tobytes()) for value in hashes)
    return np.fromiter(digests, dtype=np.uint64, count=len(hashes))
