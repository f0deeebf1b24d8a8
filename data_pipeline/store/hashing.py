"""A hash of 64-bit integers that gives the same values everywhere and always.

The order of the rows in an epoch, and the documents of a mock source, depend on it. The generators
of numpy promise no such stability for shuffles across versions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter 64-bit integers with the finalizer of SplitMix64 (Steele et al. 2014), a
    bijection.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
