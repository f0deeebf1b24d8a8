"""The fates of documents as one process decides them with all hashes and signatures in memory.

The reference for the last stage of a build, which decides them by tasks and out of core.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from data_pipeline.fates.deduplication import Fate, Fates, Mask, SourceFates
from data_pipeline.parts.near_duplicates import NUM_BANDS, NUM_HASHES, Signatures, band_keys
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.packing import Integers

COMPARE_DOCUMENTS = 1 << 16
_HELD_OUT_SALT = b"held out documents 1:"


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
    found = _all_fates(np.concatenate(hashes), np.concatenate(held))
    ends = np.cumsum([len(values) for values in hashes])[:-1]
    return [SourceFates(fates=values) for values in np.split(found, ends)]


def _all_fates(hashes: Hashes, held: Mask) -> Fates:
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


def mark_near_duplicates(fates: Fates, parts: Sequence[Signatures], threshold: float) -> None:
    """Turn TRAIN into NEAR_DUPLICATE where a document is a near copy.

    Args:
        fates: Fates of all documents of all sources, in the order of the mix; changed in place.
        parts: Their signatures, in the same order; these may be memory maps.
        threshold: Similarity from which on documents are near copies, 0 to 1.
    """
    starts = np.cumsum([0, *map(len, parts)])
    alive = np.flatnonzero((fates == Fate.TRAIN) | (fates == Fate.HELD_OUT))
    parents = np.arange(len(alive))
    for band in range(NUM_BANDS):
        pairs = _candidate_pairs(
            np.concatenate([band_keys(part, band) for part in parts])[alive], parents
        )
        for first in range(0, len(pairs), COMPARE_DOCUMENTS):
            some = pairs[first : first + COMPARE_DOCUMENTS]
            left = _gather(parts, starts, alive[some[:, 0]])
            right = _gather(parts, starts, alive[some[:, 1]])
            similar = (left == right).mean(axis=1) >= threshold
            for one, other in some[similar].tolist():
                _join(parents, one, other)
    roots = _roots(parents, np.arange(len(alive)))
    group_held = np.zeros(len(alive), dtype=bool)
    group_held[roots[fates[alive] == Fate.HELD_OUT]] = True
    is_first = roots == np.arange(len(alive))
    copies = (fates[alive] == Fate.TRAIN) & (group_held[roots] | ~is_first)
    fates[alive[copies]] = Fate.NEAR_DUPLICATE


def _candidate_pairs(keys: npt.NDArray[np.uint64], parents: Integers) -> Integers:
    """Return pairs of documents with the same key that are not yet in one group, [pairs, 2]."""
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    pairs = np.stack([order[equal], order[equal + 1]], axis=1)
    return pairs[_roots(parents, pairs[:, 0]) != _roots(parents, pairs[:, 1])]


def _gather(parts: Sequence[Signatures], starts: Integers, numbers: Integers) -> Signatures:
    """Return the signatures of documents by number."""
    result = np.empty((len(numbers), NUM_HASHES), np.uint32)
    owner = np.searchsorted(starts, numbers, side="right") - 1
    for part in np.unique(owner).tolist():
        chosen = owner == part
        result[chosen] = parts[part][numbers[chosen] - starts[part]]
    return result


def _roots(parents: Integers, numbers: Integers) -> Integers:
    """Return the first document of the group of each document."""
    while True:
        above = parents[numbers]
        if (above == numbers).all():
            return numbers
        numbers = above


def _join(parents: Integers, one: int, other: int) -> None:
    """Make two groups one, led by the smaller number."""
    while parents[one] != one:
        one = int(parents[one])
    while parents[other] != other:
        other = int(parents[other])
    parents[max(one, other)] = min(one, other)
