"""What the values of tensors look like while they are read: not finite, or nothing but zeros.

Each rank reads its part of a tensor only, so a tensor is zero if it is zero in the parts of all
ranks: what the ranks have seen is joined before it is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

LARGEST = float(torch.finfo(torch.bfloat16).max)
"""A larger magnitude is infinite in the dtype that the model computes in."""
NEARLY_ZERO = 2.0**-100
"""A tensor without a larger magnitude holds nothing: MXFP4 codes with scales of zero decode to
2^-128, not to zero.
"""
MAX_TENSORS = 20
"""Tensors that a refusal names."""


@dataclass(kw_only=True, slots=True)
class ValuesSeen:
    """What was seen of one tensor."""

    largest: float = 0.0
    """Largest magnitude of its finite pieces."""
    first_bad: int = -1
    """Position of the first value that is not finite in the flattened tensor; -1 if there is none.
    """
    bad_value: str = ""
    """That value."""

    def look(self, position: int, values: torch.Tensor) -> None:
        """Take a piece into account that begins at a position of the flattened tensor."""
        if not values.numel():
            return
        low, high = torch.aminmax(values)
        magnitude = max(-low.item(), high.item())
        is_nan = math.isnan(low.item())  # aminmax returns NaN if there is one
        if magnitude <= LARGEST and not is_nan:
            self.largest = max(self.largest, magnitude)
            return
        index = int((~(values.abs() <= LARGEST)).nonzero()[0])
        self._keep_bad(position + index, f"{float(values[index]):g}")

    def join(self, other: ValuesSeen) -> None:
        """Take in what another rank saw of the tensor."""
        self.largest = max(self.largest, other.largest)
        if other.first_bad >= 0:
            self._keep_bad(other.first_bad, other.bad_value)

    def _keep_bad(self, position: int, value: str) -> None:
        if self.first_bad < 0 or position < self.first_bad:
            self.first_bad = position
            self.bad_value = value

    def to_json(self) -> list[float | int | str]:
        """Return what another rank needs to make this again."""
        return [self.largest, self.first_bad, self.bad_value]


def joined(of_ranks: Iterable[Mapping[str, list[float | int | str]]]) -> dict[str, ValuesSeen]:
    """Return what all ranks together have seen, by tensor.

    Args:
        of_ranks: For every rank, the `to_json` of each tensor.
    """
    seen: dict[str, ValuesSeen] = {}
    for of_rank in of_ranks:
        for name, (largest, first_bad, bad_value) in of_rank.items():
            other = ValuesSeen(
                largest=float(largest), first_bad=int(first_bad), bad_value=str(bad_value)
            )
            seen.setdefault(name, ValuesSeen()).join(other)
    return seen


def may_be_zero(name: str) -> bool:
    """Return whether a sound model may hold only zeros in a tensor: biases and sinks."""
    last = name.rsplit(".", 1)[-1]
    return last == "sinks" or last.endswith("bias")


def describe_values(name: str, seen: ValuesSeen, shape: tuple[int, ...]) -> str:
    """Return why a whole tensor is no weights, or an empty string."""
    if seen.first_bad >= 0:
        place = f"at element {seen.first_bad} of {math.prod(shape)}"
        return f"tensor '{name}' holds {seen.bad_value} {place}; weights must be finite."
    if seen.largest < NEARLY_ZERO and not may_be_zero(name):
        return f"tensor '{name}' holds nothing but zeros."
    return ""
