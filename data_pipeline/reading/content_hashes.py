"""Hashes of what documents hold: equal ones are copies of each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
Hashes = npt.NDArray[np.void]
"""128-bit hashes as an array of HASH_DTYPE."""


def content_hash(content: bytes) -> int:
    """Return the xxh3_128 of a document's content."""
    return xxhash.xxh3_128_intdigest(content)
