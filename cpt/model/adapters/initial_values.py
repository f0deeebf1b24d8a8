"""The values that adapters begin with: functions of seed, name and position, in every layout.

A is uniform in +-1/sqrt(in), PEFT's Kaiming rule with a = sqrt 5, and B is zero. So the model
begins as the one below the adapters. A magnitude begins as the norm of its row of the weight.

Shape letters: O values that come out, I values that go in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch

from cpt.model.adapters.layout import AdaptedMatrix
from cpt.model.adapters.linear import row_norms
from cpt.model.weights.source import WeightSource

BLOCK_NUMEL = 2**16
"""Values that one generator draws."""
NORM_ROWS = 256
"""Rows of a weight whose norms are taken at once."""


class WithInitialAdapters:
    """A `WeightSource` of a model with new adapters: another source, and their first values."""

    def __init__(
        self,
        base: WeightSource,
        matrices: Iterable[AdaptedMatrix],
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Put adapters beside the weights of a source.

        Args:
            base: Where the weights of the model come from.
            matrices: What `adapted_matrices` returns.
            seed: Seed of the A.
            dtype: The dtype that the weights are trained beside: magnitudes are norms of the
                weights as that dtype holds them.
        """
        self.base = base
        self._seed = seed
        self._dtype = dtype
        self._by_a: dict[str, AdaptedMatrix] = {}
        self._by_b: set[str] = set()
        self._by_magnitude: dict[str, AdaptedMatrix] = {}
        for matrix in matrices:
            self._by_a[matrix.a_name] = matrix
            self._by_b.add(matrix.b_name)
            if matrix.has_magnitude:
                self._by_magnitude[matrix.magnitude_name] = matrix

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield values piece by piece; see `cpt.model.weights.source.WeightSource`."""
        if name in self._by_a:
            bound = 1 / math.sqrt(self._by_a[name].in_size)
            yield from self._uniform(name, start, stop, bound)
        elif name in self._by_b:
            yield start, torch.zeros(stop - start)
        elif name in self._by_magnitude:
            yield from self._row_norms(self._by_magnitude[name], start, stop)
        else:
            yield from self.base.pieces(name, start, stop)

    def _uniform(
        self, name: str, start: int, stop: int, bound: float
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for block in range(start // BLOCK_NUMEL, -(-stop // BLOCK_NUMEL)):
            first = block * BLOCK_NUMEL
            low = max(start, first)
            high = min(stop, first + BLOCK_NUMEL)
            key = f"{self._seed}:{name}:{block}"
            digest = hashlib.sha256(key.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.rand(BLOCK_NUMEL, generator=generator)
            yield low, values.mul_(2).sub_(1).mul_(bound)[low - first : high - first]

    def _row_norms(
        self, matrix: AdaptedMatrix, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the norms of rows [start, stop) of a weight (O, I)."""
        size = matrix.in_size
        for first in range(start, stop, NORM_ROWS):
            end = min(stop, first + NORM_ROWS)
            rows_OI = torch.empty((end - first) * size, dtype=self._dtype)
            for position, values in self.base.pieces(matrix.weight_name, first * size, end * size):
                low = position - first * size
                rows_OI[low : low + values.numel()] = values
            yield first, row_norms(rows_OI.view(-1, size))
