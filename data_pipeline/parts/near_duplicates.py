"""What near copies have in common: MinHash signatures, and the bands that make candidates.

    tokens -> 5-token shingles -> signature of 128 numbers (rensa) -> 32 bands of 4 -> candidates
    -> similar enough?

Decisions
    Shingles are runs of tokens: Japanese has no spaces, and the tokens are there anyway.
    Two documents become candidates if a band is equal (probability above 0.999 at similarity 0.8),
    and count as near copies if at least `threshold` of their 128 numbers agree, which estimates
    their Jaccard similarity (Broder 1997).
    `near_copies` compares the documents of a build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import rensa

from data_pipeline.store.hashing import Hashes64
from data_pipeline.text.tokenizer import Tokens

NUM_HASHES = 128
NUM_BANDS = 32
SHINGLE_TOKENS = 5
_BAND_HASHES = NUM_HASHES // NUM_BANDS
_SEED = 42
_SIGNED_TOKENS = 1 << 20
"""Tokens of a document that are hashed at once, which bounds the memory."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OFFSET = np.uint64(0xD1B54A32D192ED03)
_BASE = 0xBF58476D1CE4E5B9
Signatures = npt.NDArray[np.uint32]
"""MinHash signatures, [documents, NUM_HASHES]."""


def window_hashes(tokens: Tokens, length: int) -> Hashes64:
    """Return one 64-bit hash for each run of `length` tokens.

    The hash is polynomial, modulo 2^64, then scattered. Windows of 1, 2, 4, ... tokens are put
    together to windows of `length`, so the cost grows with the logarithm of the length.
    """
    num_windows = len(tokens) - length + 1
    if num_windows <= 0:
        return np.zeros(0, np.uint64)
    values = scattered(tokens)
    result: Hashes64 | None = None
    result_length = 0
    size = 1  # tokens that one of `values` stands for
    while True:
        if length & size:
            if result is None:
                result = values
            else:
                count = min(len(result), len(values) - result_length)
                following = values[result_length : result_length + count]
                result = result[:count] * power_of_base(size) + following
            result_length += size
        if size * 2 > length:
            break
        values = values[:-size] * power_of_base(size) + values[size:]
        size *= 2
    assert result is not None, "a positive length has a bit that is set"
    result = result[:num_windows].copy()
    result ^= result >> np.uint64(32)
    return result


def scattered(tokens: Tokens) -> Hashes64:
    """Return a 64-bit number for each token; these are the digits of `window_hashes`."""
    values = tokens.astype(np.uint64)
    values *= _MULTIPLIER
    values += _OFFSET
    values ^= values >> np.uint64(29)
    return values


def power_of_base(exponent: int) -> np.uint64:
    """Return the base of `window_hashes` to a power, modulo 2^64."""
    return np.uint64(pow(_BASE, exponent, 2**64))


def minhash_signatures(documents: Sequence[Tokens]) -> Signatures:
    """Return MinHash signatures, [documents, NUM_HASHES].

    A document shorter than a shingle is padded to one with its last token.
    """
    if not documents:
        return np.zeros((0, NUM_HASHES), np.uint32)
    stretches: list[Tokens] = []
    first_stretches = []
    for tokens in documents:
        first_stretches.append(len(stretches))
        stretches += _stretches(tokens)
    signatures = _signatures_of_stretches(stretches)
    # each number is the smallest hash of all shingles, whatever stretch they are in
    return np.minimum.reduceat(signatures, first_stretches, axis=0)


def _stretches(tokens: Tokens) -> Iterator[Tokens]:
    """Yield stretches of a document that together have each of its shingles once."""
    tokens = _pad(tokens)
    for start in range(0, len(tokens) - SHINGLE_TOKENS + 1, _SIGNED_TOKENS):
        yield tokens[start : start + _SIGNED_TOKENS + SHINGLE_TOKENS - 1]


def _signatures_of_stretches(stretches: Sequence[Tokens]) -> Signatures:
    """Return the signature of each stretch, [stretches, NUM_HASHES]."""
    gathered: list[Tokens] = []
    num_gathered = 0
    signatures = []
    for stretch in stretches:
        if gathered and num_gathered + len(stretch) > 2 * _SIGNED_TOKENS:
            signatures.append(_signatures_at_once(gathered))
            gathered = []
            num_gathered = 0
        gathered.append(stretch)
        num_gathered += len(stretch)
    signatures.append(_signatures_at_once(gathered))
    return np.concatenate(signatures)


def _signatures_at_once(stretches: Sequence[Tokens]) -> Signatures:
    lengths = np.array([len(tokens) for tokens in stretches])
    # all stretches at once; windows that span two of them are taken out again
    hashes = window_hashes(np.concatenate(stretches), SHINGLE_TOKENS)
    ends = np.cumsum(lengths)
    spanning = (ends[:-1, None] - np.arange(1, SHINGLE_TOKENS)).ravel()
    kept = np.delete(hashes, spanning)
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE_TOKENS + 1)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(kept, offsets, NUM_HASHES, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _pad(tokens: Tokens) -> Tokens:
    if len(tokens) >= SHINGLE_TOKENS:
        return tokens
    return np.pad(tokens, (0, SHINGLE_TOKENS - len(tokens)), mode="edge")


def band_keys(signatures: Signatures, band: int) -> Hashes64:
    """Return one hash of a band for each document, [documents]."""
    columns = slice(band * _BAND_HASHES, (band + 1) * _BAND_HASHES)
    keys = np.zeros(len(signatures), np.uint64)
    for column in np.asarray(signatures[:, columns]).T:
        keys = (keys ^ column) * _MULTIPLIER
        keys ^= keys >> np.uint64(32)
    return keys
