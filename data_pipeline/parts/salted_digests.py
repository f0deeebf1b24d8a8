"""xxh3_64 of a salt and a 128-bit hash, for many hashes at once.

The values are those of `xxhash.xxh3_64_intdigest(SALT + hash)`, with the hash as 16 bytes in little
endian, its high half first. The formulas are those of xxhash for inputs of 33 to 64 bytes
(XXH3_len_17to128_64b in xxhash.h, seed 0), in arrays; a loop over documents takes some 20 times as
long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
SALT = b"held out documents 1:"
"""What the digests of held-out documents start from."""
_LENGTH = len(SALT) + 16
_BLOCK = 1 << 14
"""Hashes at once: what fits the cache."""
_PRIME = 0x9E3779B185EBCA87
_AVALANCHE = np.uint64(0x165667919E3779F9)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
)
"""The first bytes of the secret of xxhash."""
_LOW_HALF = np.uint64(2**32 - 1)
_HALF_BITS = np.uint64(32)


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _mixed_constant(at: int, secret_at: int) -> int:
    """Return what 16 bytes of the salt add, beginning at byte `at`."""
    low = _word(SALT, at) ^ _word(_SECRET, secret_at)
    high = _word(SALT, at + 8) ^ _word(_SECRET, secret_at + 8)
    product = low * high
    return (product ^ product >> 64) % 2**64


_START = np.uint64(
    (_LENGTH * _PRIME + _mixed_constant(0, 0) + _mixed_constant(_LENGTH - 32, 48)) % 2**64
)
"""What all digests have in common: the length, and stretches that lie within the salt."""


def salted_digests(high: Words, low: Words) -> Words:
    """Return one digest for each hash, [hashes].

    Args:
        high: High half of each hash.
        low: Low half of each hash.
    """
    digests = np.empty(len(high), np.uint64)
    for start in range(0, len(high), _BLOCK):
        block = slice(start, start + _BLOCK)
        digests[block] = _digest_block(high[block], low[block])
    return digests


def _digest_block(high: Words, low: Words) -> Words:
    # bytes 16 to 31 of the input: the last five of the salt, then those of the hash
    first = np.uint64(_word(SALT, 16)) | high << np.uint64(40)
    second = high >> np.uint64(24) | low << np.uint64(40)
    total = _START + _mixed(first, second, 32) + _mixed(high, low, 16)
    total ^= total >> np.uint64(37)
    total *= _AVALANCHE
    total ^= total >> np.uint64(32)
    return total


def _mixed(first: Words, second: Words, secret_at: int) -> Words:
    """Return the halves of a product of 128 bits, folded."""
    one = first ^ np.uint64(_word(_SECRET, secret_at))
    other = second ^ np.uint64(_word(_SECRET, secret_at + 8))
    one_low = one & _LOW_HALF
    one_high = one >> _HALF_BITS
    other_low = other & _LOW_HALF
    other_high = other >> _HALF_BITS
    crossed = one_low * other_high
    middle = one_high * other_low + (one_low * other_low >> _HALF_BITS) + (crossed & _LOW_HALF)
    upper = one_high * other_high + (middle >> _HALF_BITS) + (crossed >> _HALF_BITS)
    return one * other ^ upper
