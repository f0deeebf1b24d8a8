"""Triton kernels of rows.py: a program makes one whole row.

The launchers write to the tensors that they are given, in the dtypes of these. Values of a row are
contiguous, and so are other tensors.

The distance of rows that have columns beside them is compiled in as a difference from the size of a
row. Given as a number, it would hide from the compiler that rows start at multiples of 16 bytes:
it looks for multiples of 16 values only, and else moves one value at a time.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 8


@triton.jit
def _gather_kernel(rows, index, out, size, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    source = rows + tl.load(index + row) * (size + BESIDE) + columns
    tl.store(out + row * size + columns, tl.load(source, mask=inside), mask=inside)


@triton.jit
def _combine_kernel(
    rows, places, out, size, K: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    stride = size + BESIDE
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        total += tl.load(rows + place * stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pack_kernel(
    tokens,
    weights,
    order,
    payload,
    size,
    K: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(order + row)
    width = size + BESIDE
    columns = tl.arange(0, BLOCK)
    values = tl.load(tokens + index // K * size + columns, mask=columns < size, other=0.0)
    values = values.to(tl.float32)
    weight = tl.load(weights + index).to(tl.float32)
    values = tl.where(columns == size, weight, values)
    at = payload + row * width + columns
    tl.store(at, values.to(payload.dtype.element_ty), mask=columns < width)


def gather(rows_RM: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Write the rows at `index`."""
    num_rows, size = out.shape
    if num_rows == 0:
        return
    _gather_kernel[(num_rows,)](
        rows_RM,
        index,
        out,
        size,
        BESIDE=rows_RM.stride(0) - size,
        BLOCK=triton.next_power_of_2(size),
        num_warps=NUM_WARPS,
    )


def combine(rows_RM: torch.Tensor, places_Nk: torch.Tensor, out_NM: torch.Tensor) -> None:
    """Write the sum of each token's rows."""
    num_tokens, size = out_NM.shape
    if num_tokens == 0:
        return
    _combine_kernel[(num_tokens,)](
        rows_RM,
        places_Nk,
        out_NM,
        size,
        K=places_Nk.shape[1],
        BESIDE=rows_RM.stride(0) - size,
        BLOCK=triton.next_power_of_2(size),
        num_warps=NUM_WARPS,
    )


def pack(
    tokens_NM: torch.Tensor,
    weights_Nk: torch.Tensor,
    order_R: torch.Tensor,
    payload: torch.Tensor,
) -> None:
    """Write each row's token, its weight, and zeros up to the width of the payload."""
    num_rows, width = payload.shape
    size = tokens_NM.shape[1]
    if num_rows == 0:
        return
    _pack_kernel[(num_rows,)](
        tokens_NM,
        weights_Nk,
        order_R,
        payload,
        size,
        K=weights_Nk.shape[1],
        BESIDE=width - size,
        BLOCK=triton.next_power_of_2(width),
        num_warps=NUM_WARPS,
    )
