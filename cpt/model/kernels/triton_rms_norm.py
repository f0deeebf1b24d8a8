"""Triton kernels of rms_norm.py: a program holds whole rows, each read once.

The gradient of the weight is summed in two stages: a program sums the rows that are its own, in
order, and a second kernel adds up these sums in order.

The launchers write to the tensors that they are given, in the dtypes of these. All tensors are
contiguous, (..., M).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 8

ROWS_PER_SUM = 16
"""Rows of one program of the backward: its sums add 6 % to what it reads and writes."""

SUM_COLUMNS = 32
SUM_ROWS = 64
"""The tile in which a program adds up partial sums."""


@triton.jit
def _norm_row(wide, weight, columns, inside, size, eps):
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return factor * (wide * inverse)


@triton.jit
def _norm_kernel(x, weight, normed, size, eps, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + first + columns, mask=inside, other=0.0).to(tl.float32)
    row = _norm_row(wide, weight, columns, inside, size, eps)
    tl.store(normed + first + columns, row.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(residual, y, weight, x, normed, size, eps, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(residual + first + columns, mask=inside, other=0.0).to(tl.float32)
    wide += tl.load(y + first + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = wide.to(x.dtype.element_ty)
    tl.store(x + first + columns, rounded, mask=inside)
    # The norm is that of the sum which the backward will read.
    row = _norm_row(rounded.to(tl.float32), weight, columns, inside, size, eps)
    tl.store(normed + first + columns, row.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_normed,
    d_stream,
    x,
    weight,
    d_x,
    partial,
    rows,
    size,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_STREAM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(ROWS):
        row = program * ROWS + step
        here = inside & (row < rows)
        at = row * size + columns
        wide = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        d_row = tl.load(d_normed + at, mask=here, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        quotient = wide * inverse
        total += d_row * quotient
        d_quotient = d_row * factor
        pull = tl.sum(d_quotient * quotient, 0) / size
        d_wide = (d_quotient - quotient * pull) * inverse
        if HAS_STREAM:
            d_wide += tl.load(d_stream + at, mask=here, other=0.0).to(tl.float32)
        tl.store(d_x + at, d_wide.to(d_x.dtype.element_ty), mask=here)
    tl.store(partial + program * size + columns, total, mask=inside)


@triton.jit
def _sum_kernel(partial, out, rows, size, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    first = 0
    # `range` over what is not known when compiling fails in the interpreter with numpy 2.4
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < size)[None, :]
        total += tl.load(partial + row[:, None] * size + columns[None, :], mask=inside, other=0.0)
        first += ROWS
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < size)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, normed: torch.Tensor) -> None:
    """Write the normed rows of `x`."""
    size = x.shape[-1]
    grid = (x.numel() // size,)
    if grid[0] > 0:
        block = triton.next_power_of_2(size)
        _norm_kernel[grid](x, weight, normed, size, eps, BLOCK=block, num_warps=NUM_WARPS)


def add_norm(
    residual: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    x: torch.Tensor,
    normed: torch.Tensor,
) -> None:
    """Write the sum of `residual` and `y`, and its normed rows."""
    size = residual.shape[-1]
    grid = (residual.numel() // size,)
    if grid[0] > 0:
        block = triton.next_power_of_2(size)
        _add_norm_kernel[grid](
            residual, y, weight, x, normed, size, eps, BLOCK=block, num_warps=NUM_WARPS
        )


def backward(
    d_normed: torch.Tensor,
    d_stream: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    d_x: torch.Tensor,
    d_weight: torch.Tensor,
) -> None:
    """Write the gradient of `x`, with `d_stream` added if there is one, and that of the weight."""
    size = x.shape[-1]
    rows = x.numel() // size
    if rows == 0:
        d_weight.zero_()
        return
    programs = triton.cdiv(rows, ROWS_PER_SUM)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        d_normed,
        x if d_stream is None else d_stream,
        x,
        weight,
        d_x,
        partial,
        rows,
        size,
        eps,
        BLOCK=triton.next_power_of_2(size),
        ROWS=ROWS_PER_SUM,
        HAS_STREAM=d_stream is not None,
        num_warps=NUM_WARPS,
    )
    _sum_kernel[(triton.cdiv(size, SUM_COLUMNS),)](
        partial, d_weight, programs, size, COLUMNS=SUM_COLUMNS, ROWS=SUM_ROWS
    )
