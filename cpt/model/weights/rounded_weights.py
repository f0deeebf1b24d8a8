"""Weights as an MXFP4 export of them would hold them, without files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch

from cpt.config.precision_sections import ExponentRule
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.mxfp4_rounding import round_by_bits
from cpt.model.weights.source import WeightSource, read_window

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor by name."""


class RoundedWeights:
    """A source whose expert matrices are rounded to MXFP4 and decoded again."""

    def __init__(
        self,
        source: WeightSource,
        shapes: Shapes,
        rule: ExponentRule = "floor",
        frozen: Collection[str] = (),
    ) -> None:
        """Take the weights to round.

        Args:
            source: Weights in bf16, the dtype that an export rounds from.
            shapes: Shape of every tensor.
            rule: How the exponent of a block is chosen.
            frozen: Matrices that stay as they are: training with `train.quantize` does not round
                what it does not train.
        """
        self._source = source
        self._shapes = shapes
        self._rule = rule
        self._frozen = frozenset(frozen)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See `cpt.model.weights.source.WeightSource`; ranges of expert matrices hold experts."""
        shape = self._shapes[name]
        if name in self._frozen or not is_expert_matrix(name, shape):
            yield from self._source.pieces(name, start, stop)
            return
        expert_numel = math.prod(shape[1:])
        assert start % expert_numel == 0 and stop % expert_numel == 0, (name, start, stop)
        for low in range(start, stop, expert_numel):
            flat = read_window(self._source, name, low, low + expert_numel)
            exact = flat.view(1, *shape[1:])
            round_by_bits(exact, self._rule, exact)
            yield low, exact.flatten()
