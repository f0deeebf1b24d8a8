"""The Triton kernels of expert_output.py: one program for a tile of rows and all of its columns.

Shape letters: R rows sorted by expert, M model size, E experts, T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpt.model.kernels.triton_expert_tiles import (
    ROWS,
    find_tile,
    num_tiles,
    padded,
    sum_tiles,
)

COLUMNS = 64
"""Columns that a program works on at a time, in each row of its tile."""

WARPS = 1
"""Warps of a program: one adds up the columns of a tile without waiting for another. On an H100 the
backward of 65,536 rows of 2,880 columns took 0.22 ms, and 1.07 ms with 8 warps and 128 columns.
"""


@triton.jit
def _forward(
    product: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    num_experts: tl.tensor,
    weights_stride: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    expert, first, stop = find_tile(ends, num_experts, tl.program_id(0), ROWS, EXPERTS)
    if first >= stop:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    weight = tl.load(weights + row * weights_stride, mask=row < stop, other=0).to(tl.float32)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        places = row[:, None] * SIZE + column[None, :]
        inside = (row < stop)[:, None] & (column < SIZE)[None, :]
        value = tl.load(product + places, mask=inside, other=0).to(tl.float32)
        shift = tl.load(bias + expert * SIZE + column, mask=column < SIZE, other=0).to(tl.float32)
        value = (value + shift[None, :]) * weight[:, None]
        tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    d_out: tl.tensor,
    hidden_products: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    ends: tl.tensor,
    d_weights: tl.tensor,
    tile_sums: tl.tensor,
    num_experts: tl.tensor,
    weights_stride: tl.tensor,
    NEED_WEIGHTS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert, first, stop = find_tile(ends, num_experts, tile, ROWS, EXPERTS)
    if first >= stop:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    weight = tl.load(weights + row * weights_stride, mask=row < stop, other=0).to(tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < SIZE
        places = row[:, None] * SIZE + column[None, :]
        inside = (row < stop)[:, None] & is_column[None, :]
        d = tl.load(d_out + places, mask=inside, other=0).to(tl.float32)
        if NEED_WEIGHTS:
            shift = tl.load(bias + expert * SIZE + column, mask=is_column, other=0)
            products += d * shift.to(tl.float32)[None, :]
        if NEED_BIAS:
            sums = tl.sum(d * weight[:, None], 0)
            tl.store(tile_sums + tile.to(tl.int64) * SIZE + column, sums, mask=is_column)
    if NEED_WEIGHTS:
        total = tl.load(hidden_products + row, mask=row < stop, other=0) + tl.sum(products, 1)
        tl.store(d_weights + row, total.to(d_weights.dtype.element_ty), mask=row < stop)


def forward(
    product_RM: torch.Tensor,
    bias_EM: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    out_RM: torch.Tensor,
) -> None:
    """Write what `expert_output` writes, rounded once; `out_RM` may be `product_RM`."""
    assert product_RM.is_contiguous() and bias_EM.is_contiguous() and out_RM.is_contiguous()
    num_rows, size = out_RM.shape
    num_experts = ends_E.numel()
    _forward[(num_tiles(num_rows, num_experts),)](
        product_RM,
        bias_EM,
        weights_R,
        ends_E,
        out_RM,
        num_experts,
        weights_R.stride(0),
        SIZE=size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        EXPERTS=padded(num_experts),
        num_warps=WARPS,
    )


def backward(
    d_out_RM: torch.Tensor,
    hidden_products_R: torch.Tensor,
    bias_EM: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    *,
    d_weights_R: torch.Tensor | None,
    d_bias_EM: torch.Tensor | None,
) -> None:
    """Write the gradients that are not None, each rounded once; see `expert_output_backward`."""
    assert d_out_RM.is_contiguous() and bias_EM.is_contiguous()
    num_rows, size = d_out_RM.shape
    num_experts = ends_E.numel()
    tiles = num_tiles(num_rows, num_experts)
    sums_shape = (tiles, size) if d_bias_EM is not None else (0,)
    tile_sums_TM = d_out_RM.new_empty(sums_shape, dtype=torch.float32)
    _backward[(tiles,)](
        d_out_RM,
        hidden_products_R,
        bias_EM,
        weights_R,
        ends_E,
        hidden_products_R if d_weights_R is None else d_weights_R,
        tile_sums_TM,
        num_experts,
        weights_R.stride(0),
        NEED_WEIGHTS=d_weights_R is not None,
        NEED_BIAS=d_bias_EM is not None,
        SIZE=size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        EXPERTS=padded(num_experts),
        num_warps=WARPS,
    )
    if d_bias_EM is not None:
        sum_tiles(tile_sums_TM, ends_E, d_bias_EM)
