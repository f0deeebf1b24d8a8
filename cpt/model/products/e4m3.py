"""E4M3 with power-of-two scales: the definition that every kernel of 8-bit products is held to.

    scale   rows      one for all values along the axis of the sum
            blocks    one for each 32 values along it (MXFP8)
    scale = 2^e, the smallest whose 448 scale is not below the largest magnitude,
    so that this lands in (224, 448], and e >= -126, as for a largest magnitude of 0
    code  = value / scale, rounded to the nearest E4M3 number, ties to even

Decisions
    - No value is beyond 448 after division, so none saturates.
    - Where a largest magnitude is not finite, the scale is NaN (255 in e8m0), and so are all values
      that share it: no product of theirs is finite.
    - e is never above 120. Its lower end -126 keeps the scale and its reciprocal normal numbers of
      fp32, which a GPU does not flush to zero. It loses nothing of bf16, whose smallest numbers are
      multiples of 2^-133: divided by the scale they are multiples of 2^-7, as E4M3's are 2^-9.
    - Decoded values are exact in bf16: they have 4 significant bits, and no more below its normal
      numbers. Magnitudes from 1.9375 * 2^127 on, the last of fp32 and bf16, are rounded to 2^128,
      which is infinite there.

Sources: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433 (E4M3: largest 448, no
infinities); OCP Microscaling Formats 1.0 (blocks of 32, e8m0). Its scale rule is another: it floors
the exponent and saturates what exceeds 448, where this one rounds it up.

Shape letters: K values along the axis of the sum, b their blocks of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

Scaling = Literal["rows", "blocks"]
"""What shares a scale."""

BLOCK = 32
"""Values of a block."""
LARGEST = 448.0
"""The largest number of E4M3."""
LOWEST_EXPONENT = -126
"""The exponent of the smallest scale."""
PIECE_VALUES = 2**24
"""Values that are rounded at a time."""
BYTES_OF_A_VALUE = 13
"""Temporary memory for each value of a piece, about."""

_BITS = 8
"""448 = 1.75 * 2^8."""
_FP32_BIAS = 127
_FP32_FRACTION_BITS = 23


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Return the scale for each largest magnitude, in its dtype: fp32 or float64."""
    fraction, exponent = torch.frexp(largest)  # largest = fraction 2^exponent, fraction in [1/2, 1)
    exponent = exponent - 1 - _BITS + (fraction > LARGEST / 2 ** (_BITS + 1))
    exponent = exponent.clamp(min=LOWEST_EXPONENT, max=_FP32_BIAS)
    exponent = torch.where(largest > 0, exponent, LOWEST_EXPONENT)
    return torch.where(largest.isfinite(), _power_of_two(exponent, largest.dtype), torch.nan)


def _power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 2^exponent, from its bits: a GPU's exp2 need not be exact."""
    bits = (exponent.to(torch.int32) + _FP32_BIAS) << _FP32_FRACTION_BITS
    return bits.view(torch.float32).to(dtype)


def encode(values: torch.Tensor, dim: int, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to E4M3.

    Args:
        values: Operand of a product.
        dim: The axis of the sum, from 0 on.
        scaling: What shares a scale; blocks want a multiple of 32 values along the axis.

    Returns:
        The codes in the shape of the values, float8_e4m3fn, and the scales, fp32 (float64 for
        float64 values), whose axis `dim` has length 1 for rows and K / 32 for blocks.
    """
    if scaling == "blocks":
        codes, scales = _encode_rows(values.unflatten(dim, (-1, BLOCK)), dim + 1)
        return codes.flatten(dim, dim + 1), scales.squeeze(dim + 1)
    return _encode_rows(values, dim)


def _encode_rows(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    scales = scale_of(wide.abs().amax(dim, keepdim=True))
    return (wide * scales.reciprocal()).to(torch.float8_e4m3fn), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of codes, exact in bf16, fp32 and float64; the inverse of `encode`."""
    if scales.shape[dim] > 1:
        blocks = codes.unflatten(dim, (scales.shape[dim], -1)).to(scales.dtype)
        return (blocks * scales.unsqueeze(dim + 1)).flatten(dim, dim + 1).to(dtype)
    return (codes.to(scales.dtype) * scales).to(dtype)


def rounded(values: torch.Tensor, dim: int, scaling: Scaling) -> torch.Tensor:
    """Return the operand that an 8-bit product sees, in the dtype and the layout of the values.

    Args:
        values: Operand of a product, with at least one axis before that of the sum.
        dim: The axis of the sum, from 1 on.
        scaling: What shares a scale.
    """
    out = torch.empty_like(values)
    for piece in _pieces(values):
        codes, scales = encode(values[piece], dim, scaling)
        out[piece] = decode(codes, scales, dim, values.dtype)
    return out


def _pieces(values: torch.Tensor) -> Iterator[slice]:
    """Yield ranges of the first axis of at most `PIECE_VALUES`, but at least one index long."""
    length = max(1, PIECE_VALUES // max(1, math.prod(values.shape[1:])))
    for first in range(0, values.shape[0], length):
        yield slice(first, first + length)
