"""The Triton kernel of block_rounding.py: one program for a block of inputs and 64 outputs.

All but the comparison of `least` is arithmetic on the bits of fp32, in which a bf16 number and
every code value is exact, and so is what the comparison adds up.

Shape letters: n experts or any number of pieces, C inputs (columns), R outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpt.model.weights.mxfp4 import BLOCK

OUTPUTS = 64
"""Outputs of a tile: 128 bytes of a row in bf16; they divide the widths of gpt-oss."""

WARPS = 4
"""Warps of a program."""


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    """Return the bits of 2^(exponent - 127) in fp32; from -2 to 0 it is a denormal number."""
    return tl.where(exponent > 0, exponent << 23, 1 << (22 + tl.minimum(exponent, 0)))


@triton.jit
def _to_bf16(bits: tl.tensor) -> tl.tensor:
    """Return the bits of an fp32 number rounded to bf16, ties to even; NaN becomes another."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)


@triton.jit
def _nearest(magnitude: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the bits of the nearest code values times their scale, at most 6 times it.

    From the scale on they are the bits of a value rounded to the upper bit of its mantissa, ties to
    even; below are 0, a half of it and itself.
    """
    quarter = _power_of_two(scale - 2)
    half = _power_of_two(scale - 1)
    one = _power_of_two(scale)
    six = ((scale + 2) << 23) + (1 << 22)
    # the half of a mantissa is a quarter of the scale where half of it is a denormal number
    three_quarters = half + tl.where(scale >= 2, 1 << 22, quarter)
    # the smallest scale is a denormal number, and so are the values up to twice as much
    shift = tl.where((scale == 0) & (magnitude < (1 << 23)), 21, 22)
    even = (magnitude >> shift) & 1
    rounded = ((magnitude + (1 << (shift - 1)) - 1 + even) >> shift) << shift
    rounded = tl.minimum(tl.maximum(rounded, one), six)
    below = tl.where(magnitude > quarter, half, 0)
    return tl.where(magnitude >= three_quarters, rounded, below)


@triton.jit
def _round(
    bits_of_values: tl.tensor,
    bits_of_rounded: tl.tensor,
    num_outputs: tl.tensor,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CEIL: tl.constexpr,
    LEAST: tl.constexpr,
    FROM_BF16: tl.constexpr,
    TO_BF16: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    places = (block * BLOCK + tl.arange(0, BLOCK))[:, None] * num_outputs + output[None, :]
    inside = (output < num_outputs)[None, :]
    bits = tl.load(bits_of_values + places, mask=inside, other=0).to(tl.int32)
    if FROM_BF16:
        bits = bits << 16
    else:
        bits = _to_bf16(bits)
    magnitude = bits & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=0)[None, :]

    scale = (largest >> 23) - 2
    if CEIL:
        # 6 times the scale is 1.5 times a power of two
        scale += ((largest & 0x7FFFFF) > (1 << 22)).to(tl.int32)
    scale = tl.minimum(tl.maximum(scale, 0), 252)
    rounded = _nearest(magnitude, scale)
    if LEAST:
        coarser = _nearest(magnitude, tl.minimum(scale + 1, 252))
        # (x - p)^2 - (x - q)^2 = (p - q) (p + q - 2 x): multiples of 2^-9 below 8, whose sum in
        # fp32 is exact in any order
        per_scale = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        x = magnitude.to(tl.float32, bitcast=True) * per_scale
        p = rounded.to(tl.float32, bitcast=True) * per_scale
        q = coarser.to(tl.float32, bitcast=True) * per_scale
        gain = tl.sum((p - q) * (p + q - 2 * x), axis=0)[None, :]
        rounded = tl.where(gain > 0, coarser, rounded)

    rounded = rounded | (bits & -0x80000000)
    rounded = tl.where(largest >= 0x7F800000, 0x7FC00000, rounded)
    if TO_BF16:
        rounded = rounded >> 16
    tl.store(bits_of_rounded + places, rounded.to(bits_of_rounded.dtype.element_ty), mask=inside)


def round_values(values_nCR: torch.Tensor, rule: str, out_nCR: torch.Tensor) -> None:
    """Write the rounded values; see `round_blocks_`. They are read and written as bits."""
    assert values_nCR.is_contiguous() and out_nCR.is_contiguous()
    outputs = values_nCR.shape[-1]
    blocks = values_nCR.shape[0] * values_nCR.shape[1] // BLOCK
    if values_nCR.numel() == 0:
        return
    _round[(blocks, triton.cdiv(outputs, OUTPUTS))](
        _bits(values_nCR),
        _bits(out_nCR),
        outputs,
        OUTPUTS=OUTPUTS,
        BLOCK=BLOCK,
        CEIL=rule == "ceil",
        LEAST=rule == "least",
        FROM_BF16=values_nCR.dtype == torch.bfloat16,
        TO_BF16=out_nCR.dtype == torch.bfloat16,
        num_warps=WARPS,
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
