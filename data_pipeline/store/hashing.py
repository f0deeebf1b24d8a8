"""A hash of 64-bit integers that gives the same values everywhere and always.

The order of the rows in an epoch, and the documents of a mock source, depend on it. The generators
of numpy promise no such stability for shuffles across versions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes64 = npt.NDArray[np.uint64]
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB
_FIRST_FACTOR_INVERSE = np.uint64(pow(_FIRST_FACTOR, -1, 2**64))
_SECOND_FACTOR_INVERSE = np.uint64(pow(_SECOND_FACTOR, -1, 2**64))


def splitmix64(values: Hashes64) -> Hashes64:
    """Scatter 64-bit integers with the finalizer of SplitMix64 (Steele et al. 2014), a
    bijection.
    """
    values = values + _INCREMENT
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
    return values ^ (values >> np.uint64(31))


def splitmix64_numbers(count: int) -> Hashes64:
    """Return the first numbers of a SplitMix64 generator that starts at 0."""
    return splitmix64(np.arange(count, dtype=np.uint64) * _INCREMENT)


def splitmix64_inverse(values: Hashes64) -> Hashes64:
    """Return the integers that `splitmix64` scatters to these."""
    values = values ^ (values >> np.uint64(31)) ^ (values >> np.uint64(62))
    values *= _SECOND_FACTOR_INVERSE
    values = values ^ (values >> np.uint64(27)) ^ (values >> np.uint64(54))
    values *= _FIRST_FACTOR_INVERSE
    values = values ^ (values >> np.uint64(30)) ^ (values >> np.uint64(60))
    return values - _INCREMENT
