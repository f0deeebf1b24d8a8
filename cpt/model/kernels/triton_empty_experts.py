"""The Triton kernel of empty_experts.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 64
"""Programs of each expert; an expert with rows costs the start of that many."""

VALUES = 4096
"""Values that a program clears at a time."""


@triton.jit
def _clear(matrices: tl.tensor, counts: tl.tensor, size: tl.tensor, VALUES: tl.constexpr) -> None:
    expert = tl.program_id(0)
    if tl.load(counts + expert) == 0:
        matrix = matrices + expert.to(tl.int64) * size
        zeros = tl.zeros((VALUES,), matrices.dtype.element_ty)
        start = tl.program_id(1) * VALUES
        while start < size:
            places = start + tl.arange(0, VALUES)
            tl.store(matrix + places, zeros, mask=places < size)
            start += tl.num_programs(1) * VALUES


def clear(matrices_EKN: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Fill the matrices of experts without rows with zeros."""
    assert matrices_EKN.is_contiguous() and counts_E.is_contiguous()
    num_experts, rows, columns = matrices_EKN.shape
    _clear[(num_experts, PROGRAMS)](matrices_EKN, counts_E, rows * columns, VALUES=VALUES)
