"""Rounding to MXFP4 by the bit patterns of bf16, in place, for CPUs: `mxfp4.rounded`, faster.

The magnitudes of bf16 are ordered as their patterns are, and a pattern rounded to the upper bit of
its mantissa is the nearest code value from 1 times the scale on, ties to even.  Below that there
are three code values (0, 0.5, 1), which two comparisons tell apart.  So everything but the errors
of `least` is arithmetic on 16-bit integers, and codes are never made.

Shape letters: b blocks, R outputs (consecutive values).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cpt.config.precision_sections import ExponentRule
from cpt.model.weights import mxfp4

PIECE_VALUES = 2**18
"""Values that are rounded at a time, at least one block of every output: they stay in the cache."""

BYTES_OF_A_VALUE = 24
"""Temporary memory for each value of a piece, at most: `least` with two roundings and errors."""

_MAGNITUDE = 0x7FFF
_SIGN = -0x8000
_EXPONENT_SHIFT = 7
_MANTISSA = 0x7F
_INFINITY = 0x7F80
_HALF_A_MANTISSA = 0x40
"""The mantissa of 6 and of 0.75, as of 1.5 times any power of two."""
_SCALES = (3, 252)
"""The smallest scale with which a quarter of it is a normal number, and the largest one that
`encode` gives."""
_SMALLEST = (_SCALES[0] + 2) << _EXPONENT_SHIFT
"""The pattern of the smallest value that a block of the smallest of these scales may have as its
largest: 2^-122."""


def round_by_bits(values: torch.Tensor, rule: ExponentRule, out: torch.Tensor) -> None:
    """Write `mxfp4.rounded(values, rule)` to `out`, bit for bit.

    Beside the two tensors it takes BYTES_OF_A_VALUE for each of PIECE_VALUES values.

    Args:
        values: (n, 32 k, R) in bf16 or fp32 on the CPU, contiguous.
        rule: How the exponent of a block is chosen.
        out: Of the same shape in bf16 or fp32, contiguous; may be `values`.
    """
    for piece, place in pieces_of_blocks(values, out, PIECE_VALUES):
        place.copy_(_rounded_piece(piece.bfloat16(), rule))


def pieces_of_blocks(
    values: torch.Tensor, out: torch.Tensor, piece_values: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield blocks (b, 32, R) of values and their places in `out`.

    Args:
        values: (n, 32 k, R), contiguous.
        out: Of the same shape, contiguous; may be `values`.
        piece_values: Values of a piece at most, but for a piece of one block of every output.
    """
    outputs = values.shape[-1]
    if values.numel() == 0:
        return
    blocks = max(1, piece_values // (mxfp4.BLOCK * outputs))
    values_b32R = values.view(-1, mxfp4.BLOCK, outputs)
    out_b32R = out.view(-1, mxfp4.BLOCK, outputs)
    yield from zip(values_b32R.split(blocks), out_b32R.split(blocks), strict=True)


def _rounded_piece(values_b32R: torch.Tensor, rule: ExponentRule) -> torch.Tensor:
    bits = values_b32R.view(torch.int16)
    magnitude = bits & _MAGNITUDE
    largest_b1R = magnitude.amax(1, keepdim=True)
    if _has_odd_blocks(largest_b1R):
        return mxfp4.rounded(values_b32R, rule)
    scale_b1R = (largest_b1R >> _EXPONENT_SHIFT) - 2
    if rule == "ceil":
        scale_b1R += (largest_b1R & _MANTISSA) > _HALF_A_MANTISSA
    scale_b1R.clamp_(*_SCALES)
    rounded = _nearest(magnitude, scale_b1R)
    if rule == "least":
        next_b1R = (scale_b1R + 1).clamp_(max=_SCALES[1])
        coarser = _nearest(magnitude, next_b1R)
        is_better = _is_better(magnitude, rounded, coarser, scale_b1R)
        rounded += coarser.sub_(rounded).mul_(is_better)
    rounded |= bits & _SIGN
    return rounded.view(torch.bfloat16)


def _has_odd_blocks(largest_b1R: torch.Tensor) -> bool:
    """Return whether a block is not finite, or so small that it has denormal code values."""
    if int(largest_b1R.max()) >= _INFINITY:
        return True
    return bool(((largest_b1R > 0) & (largest_b1R < _SMALLEST)).any())


def _nearest(magnitude_b32R: torch.Tensor, scale_b1R: torch.Tensor) -> torch.Tensor:
    """Return the patterns of the nearest code values times their scale, at most 6 times it."""
    one = scale_b1R << _EXPONENT_SHIFT
    half = one - (1 << _EXPONENT_SHIFT)
    quarter = half - (1 << _EXPONENT_SHIFT)
    three_quarters = half + _HALF_A_MANTISSA
    six = one + (2 << _EXPONENT_SHIFT) + _HALF_A_MANTISSA
    # to the upper bit of the mantissa, ties to even
    rounded = magnitude_b32R >> 6
    rounded &= 1
    rounded += magnitude_b32R
    rounded += 31
    rounded &= -64
    torch.clamp(rounded, one, six, out=rounded)
    # torch.where takes 30 times as long as a comparison and a product on 16-bit integers
    rounded -= half
    mark = torch.empty_like(rounded)
    rounded *= torch.ge(magnitude_b32R, three_quarters, out=mark)
    torch.gt(magnitude_b32R, quarter, out=mark)
    mark *= half
    rounded += mark
    return rounded


def _is_better(
    magnitude_b32R: torch.Tensor,
    rounded_b32R: torch.Tensor,
    coarser_b32R: torch.Tensor,
    scale_b1R: torch.Tensor,
) -> torch.Tensor:
    """Return 1 for a block that the coarser values are closer to, else 0; (b, 1, R) int16.

    With p and q for a value x that is rounded in two ways, (x - p)^2 - (x - q)^2 = (p - q) (p + q -
    2 x), in units of the scale a multiple of 2^-9 below 8. So a sum in fp32 is exact, and it is 0
    where `mxfp4` finds the errors equal.
    """
    x = magnitude_b32R.view(torch.bfloat16).float()
    p = rounded_b32R.view(torch.bfloat16).float()
    q = coarser_b32R.view(torch.bfloat16).float()
    x.mul_(-2).add_(p).add_(q)
    p.sub_(q)
    per_scale = torch.ldexp(torch.ones(scale_b1R.shape), 127 - scale_b1R.int())
    x.mul_(per_scale)
    p.mul_(per_scale)
    return (x.mul_(p).sum(1, keepdim=True) > 0).to(torch.int16)
