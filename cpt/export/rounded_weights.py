"""Weights to compare an MXFP4 export with, without files.

So the cost of rounding is known before anything is written, and every rank rounds its own experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cpt.export.expert_rounding import FiniteCheck
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.rounded_weights import Shapes
from cpt.model.weights.source import WeightSource


class WithExpertsOf:
    """A source whose expert matrices come from another one.

    Biases of experts, the router and all else stay: only the matrices can be lost in rounding.
    """

    def __init__(self, source: WeightSource, experts: WeightSource, shapes: Shapes) -> None:
        """Take both models.

        Args:
            source: Weights in bf16.
            experts: Those of another model, of which only the expert matrices are read.
            shapes: Shape of every tensor of either.
        """
        self._source = source
        self._experts = experts
        self._shapes = shapes

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See `cpt.model.weights.source.WeightSource`."""
        if not is_expert_matrix(name, self._shapes[name]):
            yield from self._source.pieces(name, start, stop)
            return
        for position, values in self._experts.pieces(name, start, stop):
            yield position, values.to(torch.bfloat16)


class FiniteWeights:
    """A source that refuses values that are not finite when they are read."""

    def __init__(self, source: WeightSource, checkpoint: str) -> None:
        """Take the weights.

        Args:
            source: Weights in bf16.
            checkpoint: Name of their checkpoint, for the message.
        """
        self._source = source
        self._checkpoint = checkpoint

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield values; see `cpt.model.weights.source.WeightSource`.

        Raises:
            CheckpointError: the values of this range are not all finite; it names the tensor.
        """
        check = FiniteCheck()
        for position, values in self._source.pieces(name, start, stop):
            check.look(name, values)
            yield position, values
        check.refuse(self._checkpoint)
