"""Inputs of the experts' kernels, and their comparison with eager bodies in float64.

Tolerances, relative in l2: 1e-6 for fp32 stores (the order of summation, and the exponential of a
GPU), 4e-3 for bf16 (rounding, 2^-9).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import pytest
import torch

Shape = tuple[tuple[int, ...], int]
"""Rows of each expert, and the size of a model or of an expert."""

TOLERANCE = 1e-6
BF16_TOLERANCE = 4e-3

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dataclass(frozen=True)
class KernelInputs:
    """Tensors of one call; a test file adds those of its kernel."""

    bias: torch.Tensor
    weights: torch.Tensor
    ends: torch.Tensor

    def in_float64(self) -> Self:
        """Return the same values on the CPU, in float64 where they are no indices."""
        exact = {}
        for field in fields(self):
            tensor = getattr(self, field.name).cpu()
            exact[field.name] = tensor.double() if tensor.is_floating_point() else tensor
        return type(self)(**exact)


class Normal:
    """Random numbers in a dtype, on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(7)
        self._dtype = dtype
        self._device = device

    def draw(self, *sizes: int) -> torch.Tensor:
        """Return a tensor of these sizes."""
        drawn = torch.randn(*sizes, generator=self._generator)
        return drawn.to(self._dtype).to(self._device)


def ends_of(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the first row after each expert's."""
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare with an exact result in float64."""
    difference = found.cpu().double() - expected
    allowed = tolerance * expected.norm()
    assert found.shape == expected.shape
    assert difference.norm() <= allowed, f"{difference.norm() / expected.norm()}"
