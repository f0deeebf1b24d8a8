"""The Triton kernels of e4m3.py.

    _rows        one program for some rows, or blocks of 32, which it holds in registers
    _columns     one program for 64 columns of an expert, 32 of their values at a time

Shape letters: N rows or columns, K values along the sum, E experts, b scales of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpt.model.products.e4m3 import BLOCK

VALUES = 8192
"""Values that a program of `_rows` holds at most, if a row is not longer."""

COLUMNS = 64
"""Columns of a program of `_columns`: 128 bytes of bf16 are read in a piece."""

WARPS = 4
"""Warps of a program."""


@triton.jit
def _magnitude_bits(values: tl.tensor) -> tl.tensor:
    """Return the bits of |x| in fp32: integers in the order of the magnitudes, NaN above all."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _biased_exponent(largest: tl.tensor) -> tl.tensor:
    """Return e + 127 for the bits of a largest magnitude, at least 1.

    1.75 * 2^8 is the largest code: a fraction above 1.75 carries into the exponent.
    """
    return tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)


@triton.jit
def _scale_bits(largest: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """Return the bits of the scale in fp32: NaN where the largest magnitude is not finite."""
    return tl.where(largest >= 0x7F800000, 0x7FC00000, exponent << 23)


@triton.jit
def _code(values: tl.tensor, largest: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """Return the codes of values that share a scale, as integers.

    A normal number keeps three bits of its fraction; below 2^-6 codes count multiples of 2^-9,
    which are the last bits of a sum with 2^14.
    """
    wide = values.to(tl.float32)
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    size = tl.abs(wide) * reciprocal
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bits < (121 << 23), small, normal)
    code = tl.where(largest >= 0x7F800000, 0x7F, code)
    sign = (wide.to(tl.int32, bitcast=True) >> 24) & 0x80
    return code | sign


@triton.jit
def _rows(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LENGTH)
    places = row[:, None] * length + column[None, :]
    inside = (row < num_rows)[:, None] & (column < length)[None, :]
    tile = tl.load(values + places, mask=inside, other=0)
    largest = tl.max(_magnitude_bits(tile), 1)
    exponent = _biased_exponent(largest)
    code = _code(tile, largest[:, None], exponent[:, None])
    tl.store(codes + places, code.to(tl.uint8), mask=inside)
    tl.store(scales + row, _scale_bits(largest, exponent), mask=row < num_rows)


@triton.jit
def _columns(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    length: tl.tensor,
    num_columns: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
) -> None:
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < num_columns
    along = tl.arange(0, BLOCK)
    first_value = values + expert * length * num_columns
    column_of_all = expert * num_columns + column
    largest = tl.zeros((COLUMNS,), tl.int32)
    if not IN_BLOCKS:
        for first in range(0, length, BLOCK):
            inside = (first + along < length)[:, None] & column_inside[None, :]
            places = (first + along)[:, None].to(tl.int64) * num_columns + column[None, :]
            tile = tl.load(first_value + places, mask=inside, other=0)
            largest = tl.maximum(largest, tl.max(_magnitude_bits(tile), 0))
        exponent = _biased_exponent(largest)
        tl.store(scales + column_of_all, _scale_bits(largest, exponent), mask=column_inside)
    for first in range(0, length, BLOCK):
        inside = (first + along < length)[:, None] & column_inside[None, :]
        places = (first + along)[:, None].to(tl.int64) * num_columns + column[None, :]
        tile = tl.load(first_value + places, mask=inside, other=0)
        if IN_BLOCKS:
            largest = tl.max(_magnitude_bits(tile), 0)
            scale_places = column_of_all * (length // BLOCK) + first // BLOCK
            bits = _scale_bits(largest, _biased_exponent(largest))
            tl.store(scales + scale_places, bits, mask=column_inside)
        code = _code(tile, largest[None, :], _biased_exponent(largest)[None, :])
        turned_places = column_of_all[:, None] * length + first + along[None, :]
        turned_inside = column_inside[:, None] & (first + along < length)[None, :]
        tl.store(codes + turned_places, tl.trans(code).to(tl.uint8), mask=turned_inside)


def encode_rows(values_NK: torch.Tensor, codes_NK: torch.Tensor, scales_Nb: torch.Tensor) -> None:
    """Write codes and scales of rows; see `cpt.model.kernels.e4m3`."""
    assert values_NK.is_contiguous() and codes_NK.is_contiguous() and scales_Nb.is_contiguous()
    if values_NK.numel() == 0:
        return
    num_rows = scales_Nb.numel()
    length = values_NK.numel() // num_rows
    padded = triton.next_power_of_2(length)
    rows = max(1, min(VALUES // padded, triton.next_power_of_2(num_rows)))
    _rows[(triton.cdiv(num_rows, rows),)](
        values_NK,
        codes_NK.view(torch.uint8),
        scales_Nb.view(torch.int32),
        num_rows,
        length,
        ROWS=rows,
        LENGTH=padded,
        num_warps=WARPS,
    )


def encode_columns(
    values_EKN: torch.Tensor, codes_ENK: torch.Tensor, scales_ENb: torch.Tensor
) -> None:
    """Write codes and scales of columns, turned over; see `cpt.model.kernels.e4m3`."""
    assert values_EKN.is_contiguous() and codes_ENK.is_contiguous() and scales_ENb.is_contiguous()
    if values_EKN.numel() == 0:
        return
    experts, length, num_columns = values_EKN.shape
    _columns[(triton.cdiv(num_columns, COLUMNS), experts)](
        values_EKN,
        codes_ENK.view(torch.uint8),
        scales_ENb.view(torch.int32),
        length,
        num_columns,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
        IN_BLOCKS=scales_ENb.shape[2] > 1,
        num_warps=WARPS,
    )
