"""Flat ranges of tensors: each rank writes and reads contiguous ranges of 1-D tensors.

A ZeRO shard of any stage is such a range, and so is a slice of the expert axis; a DTensor could
only express the even cuts of ZeRO-3. The files know nothing of the layout that wrote them, so any
layout can read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.storage.narrow_moments import Blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRange:
    """Elements [offset, offset + len(tensor)) of a flattened global tensor."""

    tensor: torch.Tensor
    """1-D values, read on save and written in place on load."""
    offset: int
    """First element in the global tensor."""
    global_numel: int
    """Number of elements of the global tensor."""
    exponents: torch.Tensor | None = None
    """Exponents of the blocks of a moment in the form int8, of which `tensor` holds the codes."""
    signed: bool = False
    """Whether such a moment has a sign."""

    @property
    def blocks(self) -> Blocks | None:
        """The values as blocks of 8 bits; None if they are numbers of their own."""
        if self.exponents is None:
            return None
        return Blocks(codes=self.tensor, exponents=self.exponents, signed=self.signed)

    def zero_(self) -> None:
        """Set all values to zero."""
        self.tensor.zero_()
        if self.exponents is not None:
            self.exponents.zero_()
