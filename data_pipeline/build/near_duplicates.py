"""Near copies: MinHash signatures, and which documents they make copies of which.

    tokens -> 5-token shingles -> signature of 128 numbers (rensa) -> 32 bands of 4 -> candidates ->
    similar enough?

Decisions
    Shingles are runs of tokens: Japanese has no spaces, and the tokens are there anyway.
    Two documents meet if a band is equal (probability above 0.999 at similarity 0.8) and count as
    near copies if at least `threshold` of their 128 numbers agree, an estimate of their Jaccard
    similarity (Broder 1997). Near copies form groups.  The first document of a group, in the order
    of the mix, is trained on, unless one of the group is held out: then none is.
    Bands are compared one after the other, so memory holds one number per document and band, not
    the signatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import rensa

from data_pipeline.build.deduplication import Fate, Fates
from data_pipeline.text.tokenizer import Tokens

NUM_HASHES = 128
NUM_BANDS = 32
_BAND_ROWS = NUM_HASHES // NUM_BANDS
SHINGLE_TOKENS = 5
_SEED = 42
_COMPARE_DOCUMENTS = 1 << 16
Signatures = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


def window_hashes(tokens: Tokens, length: int) -> npt.NDArray[np.uint64]:
    """One 64-bit hash for each run of `length` tokens (polynomial, modulo 2^64, then scattered)."""
    values = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        0xD1B54A32D192ED03
    )
    values ^= values >> np.uint64(29)
    base = 0xBF58476D1CE4E5B9
    # windows of 1, 2, 4, ... put together to one of `length`
    result, done = None, 0
    size = 1
    while True:
        if length & size:
            if result is None:
                result = values
            else:
                count = min(len(result), len(values) - done)
                if count <= 0:
                    return np.zeros(0, np.uint64)
                result = (
                    result[:count] * np.uint64(pow(base, size, 2**64)) + values[done : done + count]
                )
            done += size
        if size * 2 > length:
            break
        if len(values) <= size:
            return np.zeros(0, np.uint64)
        values = values[:-size] * np.uint64(pow(base, size, 2**64)) + values[size:]
        size *= 2
    assert result is not None
    result = result[: max(len(tokens) - length + 1, 0)].copy()
    result ^= result >> np.uint64(32)
    return result


def minhash_signatures(documents: Sequence[Tokens]) -> Signatures:
    """[documents, NUM_HASHES] MinHash signatures; a document shorter than a shingle is padded to
    one.
    """
    if not documents:
        return np.zeros((0, NUM_HASHES), np.uint32)
    padded = [
        d if len(d) >= SHINGLE_TOKENS else np.pad(d, (0, SHINGLE_TOKENS - len(d)), mode="edge")
        for d in documents
    ]
    lengths = np.array([len(tokens) for tokens in padded])
    # all documents at once; windows that span two of them are taken out again
    hashes = window_hashes(np.concatenate(padded), SHINGLE_TOKENS)
    ends = np.cumsum(lengths)
    spanning = (ends[:-1, None] - np.arange(1, SHINGLE_TOKENS)).ravel()
    kept = np.delete(hashes, spanning)
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE_TOKENS + 1)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(kept, offsets, NUM_HASHES, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def mark_near_duplicates(fates: Fates, parts: Sequence[Signatures], threshold: float) -> None:
    """Turn TRAIN into NEAR_DUPLICATE where a document is a near copy.

    Args:
        fates: of all documents of all sources, in the order of the mix; changed in place.
        parts: their signatures, in the same order; may be memory maps.
        threshold: similarity from which on documents are near copies.
    """
    starts = np.cumsum([0, *map(len, parts)])
    alive = np.flatnonzero((fates == Fate.TRAIN) | (fates == Fate.HELD_OUT))
    parents = np.arange(len(alive))
    for band in range(NUM_BANDS):
        keys = _band_keys(parts, band)[alive]
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if not len(equal):
            continue
        pairs = np.stack([order[equal], order[equal + 1]], axis=1)
        pairs = pairs[_root(parents, pairs[:, 0]) != _root(parents, pairs[:, 1])]
        for first in range(0, len(pairs), _COMPARE_DOCUMENTS):
            some = pairs[first : first + _COMPARE_DOCUMENTS]
            left, right = (_gather(parts, starts, alive[some[:, side]]) for side in (0, 1))
            similar = (left == right).mean(axis=1) >= threshold
            for one, other in some[similar].tolist():
                _join(parents, one, other)
    roots = _root(parents, np.arange(len(alive)))
    held = np.zeros(len(alive), dtype=bool)
    held[roots[fates[alive] == Fate.HELD_OUT]] = True
    copies = (fates[alive] == Fate.TRAIN) & (held[roots] | (roots != np.arange(len(alive))))
    fates[alive[copies]] = Fate.NEAR_DUPLICATE


def _band_keys(parts: Sequence[Signatures], band: int) -> npt.NDArray[np.uint64]:
    """One hash of the band per document."""
    columns = slice(band * _BAND_ROWS, (band + 1) * _BAND_ROWS)
    keys = []
    for part in parts:
        key = np.zeros(len(part), np.uint64)
        for column in np.asarray(part[:, columns]).T:
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(32)
        keys.append(key)
    return np.concatenate(keys) if keys else np.zeros(0, np.uint64)


def _gather(parts: Sequence[Signatures], starts: Indices, numbers: Indices) -> Signatures:
    """Signatures of documents by number."""
    result = np.empty((len(numbers), NUM_HASHES), np.uint32)
    owner = np.searchsorted(starts, numbers, side="right") - 1
    for part in np.unique(owner).tolist():
        chosen = owner == part
        result[chosen] = parts[part][numbers[chosen] - starts[part]]
    return result


def _root(parents: Indices, numbers: Indices) -> Indices:
    """First document of the group of each document."""
    while True:
        above = parents[numbers]
        if (above == numbers).all():
            return numbers
        numbers = above


def _join(parents: Indices, one: int, other: int) -> None:
    """Make two groups one, led by the smaller number."""
    while parents[one] != one:
        one = int(parents[one])
    while parents[other] != other:
        other = int(parents[other])
    parents[max(one, other)] = min(one, other)
