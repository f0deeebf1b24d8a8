"""The weights of a model with its adapter added: W + s B A, one matrix at a time.

    base -> W in the dtype it was trained beside -> fp32 -> + s B A -> a wanted dtype

A matrix is merged whole, whatever range of it is asked for, so its bits do not depend on who asks:
memory holds one projection or one expert in fp32, twice.

Shape letters: R rank, I values that go in, O values that come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from cpt.model.adapters.layout import AdaptedMatrix
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.source import WeightSource, read_window


class AdaptedWeights:
    """A `WeightSource` of a whole model: another one, with an adapter added to some matrices."""

    def __init__(
        self,
        base: WeightSource,
        adapter: WeightSource,
        matrices: Iterable[AdaptedMatrix],
        scale: float,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        trained_beside: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        """Take the two parts.

        Args:
            base: The model below the adapter.
            adapter: The tensors of the adapter, in fp32.
            matrices: What the adapter adapts.
            scale: Factor of the adapter.
            shapes: Shape of every tensor of the model, without the adapter.
            trained_beside: The dtype in which training held the weights of the base.
            dtype: The dtype of what is yielded.
        """
        self.shapes = dict(shapes)
        """Shape of every tensor of the merged model."""
        self._base = base
        self._adapter = adapter
        self._by_weight = {matrix.weight_name: matrix for matrix in matrices}
        self._scale = scale
        self._trained_beside = trained_beside
        self._dtype = dtype

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield values piece by piece; see `cpt.model.weights.source.WeightSource`."""
        matrix = self._by_weight.get(name)
        if matrix is None:
            for position, values in self._base.pieces(name, start, stop):
                yield position, values.to(self._trained_beside).to(self._dtype)
            return
        numel = matrix.in_size * matrix.out_size
        for number in range(start // numel, -(-stop // numel)):
            first = number * numel
            low = max(start, first)
            high = min(stop, first + numel)
            merged = self._merged(matrix, number).view(-1)
            yield low, merged[low - first : high - first].to(self._dtype)

    def refuse_unusable(self) -> None:
        """Refuse a base whose values cannot be weights; see `DirectoryWeights.refuse_unusable`.

        Raises:
            ConfigError: values that were read are not finite, or tensors hold only zeros.
        """
        if isinstance(self._base, DirectoryWeights):
            self._base.refuse_unusable([self._base.seen_json()])

    def _merged(self, matrix: AdaptedMatrix, number: int) -> torch.Tensor:
        """Return a projection (O, I), or an expert (I, O) by its number, in fp32."""
        numel = matrix.in_size * matrix.out_size
        first = number * numel
        flat = torch.empty(numel)
        for position, values in self._base.pieces(matrix.weight_name, first, first + numel):
            low = position - first
            flat[low : low + values.numel()] = values.to(self._trained_beside)
        if matrix.of_experts:
            a_IR = self._factor(matrix, matrix.a_name, number)
            b_RO = self._factor(matrix, matrix.b_name, number)
            return flat.view(matrix.in_size, matrix.out_size).addmm_(a_IR, b_RO, alpha=self._scale)
        a_RI = self._factor(matrix, matrix.a_name, number)
        b_OR = self._factor(matrix, matrix.b_name, number)
        w_OI = flat.view(matrix.out_size, matrix.in_size).addmm_(b_OR, a_RI, alpha=self._scale)
        if matrix.has_magnitude:
            magnitude_O = self._whole(matrix.magnitude_name, 0, matrix.out_size)
            w_OI.mul_((magnitude_O / torch.linalg.norm(w_OI, dim=1))[:, None])
        return w_OI

    def _factor(self, matrix: AdaptedMatrix, name: str, number: int) -> torch.Tensor:
        """Return A or B of a projection, of an expert by its number, or of all experts."""
        shape = matrix.shapes()[name]
        if matrix.num_experts is not None:
            shape = shape[1:]
            first = number * math.prod(shape)
            return self._whole(name, first, first + math.prod(shape)).view(shape)
        return self._whole(name, 0, math.prod(shape)).view(shape)

    def _whole(self, name: str, start: int, stop: int) -> torch.Tensor:
        return read_window(self._adapter, name, start, stop).float()
