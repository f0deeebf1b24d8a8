"""MXFP4, the format of the released expert weights: exact decoding, encoding to the nearest code.

A block is 32 consecutive input values of one output row: 16 bytes of two 4-bit codes, low nibble
first, and one exponent.  Bit 3 of a code is the sign, bits 0-2 index 0, 0.5, 1, 1.5, 2, 3, 4, 6;
value = code value * 2^(scale - 127). Every value is exact in bf16.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3. The layout of the released
checkpoints is the one that transformers reads in integrations/mxfp4.py.

Shape letters: E experts, R output rows, C inputs (columns), b blocks of a row (C / 32).
"""

from __future__ import annotations

from typing import get_args

import torch

from cpt.config import precision_sections
from cpt.config.precision_sections import ExponentRule

BLOCK = precision_sections.BLOCK
EXPONENT_RULES: tuple[ExponentRule, ...] = get_args(ExponentRule)
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_EXPONENT_BIAS = 127
_LARGEST_EXPONENT = 2
"""Exponent of the largest power of two among the code values (4)."""
_MANTISSA_OF_LARGEST = 0.75
"""The mantissa of the largest code value (6), as frexp gives it."""
_LARGEST_ENCODED = 125
"""The exponent with which every code value is finite in bf16 and fp32."""
_ERROR_UNITS = 512
"""Units of a code value of 1 in which errors are compared."""
NOT_FINITE = 255
"""The scale of a block that holds NaN or infinity; every other one is a power of two."""
_AS_WIDE_AS_A_PAIR = {
    torch.bfloat16: torch.int32,
    torch.float32: torch.int64,
    torch.float64: torch.complex128,
}
"""A dtype that moves two values at once."""


def decode(
    blocks_ERb16: torch.Tensor, scales_ERb: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Return values (E, C, R), in the orientation of Hugging Face's expert parameters.

    A byte is looked up as the pair of values that it stands for.
    """
    experts, rows, num_blocks, _ = blocks_ERb16.shape
    device = blocks_ERb16.device
    pairs_256 = _pairs(dtype, device).view(_AS_WIDE_AS_A_PAIR[dtype]).flatten()
    values = pairs_256.index_select(0, blocks_ERb16.flatten().int()).view(dtype)
    values_ERb32 = values.view(experts, rows, num_blocks, BLOCK)
    factors = _powers_of_two(dtype, device).index_select(0, scales_ERb.flatten().int())
    values_ERb32.mul_(factors.view(experts, rows, num_blocks, 1))
    return values_ERb32.flatten(-2).transpose(1, 2).contiguous()


def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the two code values of every byte, (256, 2)."""
    magnitudes = torch.tensor(_VALUES, dtype=dtype, device=device)
    table = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte & 0x0F], table[byte >> 4]], dim=-1)


def _powers_of_two(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the factor of every scale, (256,); the last is infinite in fp32 and bf16."""
    exponents = torch.arange(256, device=device) - _EXPONENT_BIAS
    return torch.ldexp(torch.ones(256, device=device), exponents).to(dtype)


def encode(
    values_ECR: torch.Tensor, rule: ExponentRule = "floor"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the nearest code, ties to the even one.

    The exponent of a block follows a rule:

    - `floor`: floor(log2(largest magnitude)) - 2. Magnitudes from 7 times the scale on are clipped
      to 6 times the scale (OCP Microscaling Formats v1.0, section 6.3).
    - `ceil`: ceil(log2(largest magnitude / 6)). Nothing is clipped (NVIDIA ModelOpt, OpenAI's
      triton_kernels).
    - `least`: that of `floor` or the next one, whichever has the smaller squared error; the former
      if they are equal.

    Values that were decoded from MXFP4 come back without loss under each rule; the scale may differ
    where a block did not use its range. A block with a value that is not finite gets the scale 255,
    so that none of its values is finite when it is decoded.

    Args:
        values_ECR: The values, in the orientation of Hugging Face's expert parameters.
        rule: How the exponent of a block is chosen.

    Returns:
        Blocks (E, R, b, 16) and scales (E, R, b), both uint8.

    Raises:
        ValueError: The number of inputs is not a multiple of 32.
    """
    experts, inputs, rows = values_ECR.shape
    if inputs % BLOCK:
        raise ValueError(f"MXFP4 needs a multiple of {BLOCK} inputs, got {inputs}.")
    x_ERb32 = values_ECR.transpose(1, 2).reshape(experts, rows, inputs // BLOCK, BLOCK).float()
    exponent_ERb = _exponents(x_ERb32, rule)
    codes = _codes(torch.ldexp(x_ERb32, -exponent_ERb.unsqueeze(-1)))
    pairs = codes.unflatten(-1, (BLOCK // 2, 2))
    blocks = pairs[..., 0] | (pairs[..., 1] << 4)
    scales_ERb = (exponent_ERb + _EXPONENT_BIAS).to(torch.uint8)
    is_finite_ERb = x_ERb32.isfinite().all(-1)
    return blocks.contiguous(), torch.where(is_finite_ERb, scales_ERb, NOT_FINITE).contiguous()


def _exponents(x_ERb32: torch.Tensor, rule: ExponentRule) -> torch.Tensor:
    """Return the exponent of every block, (E, R, b) int32; any where a value is not finite."""
    # frexp gives largest = mantissa * 2^exponent with mantissa in [0.5, 1), so floor(log2(largest))
    # is exactly exponent - 1.
    mantissa_ERb, exponent_ERb = torch.frexp(x_ERb32.abs().amax(-1))
    floor_ERb = exponent_ERb - 1 - _LARGEST_EXPONENT
    if rule == "floor":
        return _clamped(floor_ERb)
    if rule == "ceil":
        # largest / 6 = mantissa / 0.75 * 2^floor, so the exponent is that of floor or the next one.
        return _clamped(floor_ERb + (mantissa_ERb > _MANTISSA_OF_LARGEST).int())
    floor_ERb = _clamped(floor_ERb)
    scaled = torch.ldexp(x_ERb32, -floor_ERb.unsqueeze(-1))
    is_better_ERb = _squared_error(scaled, 2) < _squared_error(scaled, 1)
    return _clamped(floor_ERb + is_better_ERb.int())


def _clamped(exponent: torch.Tensor) -> torch.Tensor:
    return exponent.clamp(-_EXPONENT_BIAS, _LARGEST_ENCODED)


def _squared_error(scaled: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the squared error of every block if the codes stand for `factor` times their value.

    The sum is one of integers, in multiples of 2^-18, so that no order of its terms changes it and
    every device chooses the same exponent. Values that are 0 with either factor are left out. What
    remains of bf16 is a multiple of 2^-9, so nothing is lost.
    """
    codes = _codes(scaled / factor)
    values = torch.tensor(_VALUES, device=scaled.device)
    magnitude = scaled.abs()
    error = values[(codes & 7).int()] * factor - magnitude
    units = (error * _ERROR_UNITS).round().int()
    units = torch.where(magnitude > _MIDPOINTS[0], units, 0)
    return (units * units).sum(-1, dtype=torch.int32)


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """Return the nearest code of every value, uint8."""
    magnitude = scaled.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for code_below, midpoint in enumerate(_MIDPOINTS):
        # A tie goes to the even one of the codes below and above the midpoint.
        if code_below % 2:
            codes += magnitude >= midpoint
        else:
            codes += magnitude > midpoint
    return codes | torch.signbit(scaled).to(torch.uint8) << 3


def rounded(values_ECR: torch.Tensor, rule: ExponentRule = "floor") -> torch.Tensor:
    """Return the values that an MXFP4 export of these has, (E, C, R) in their own dtype.

    Raises:
        ValueError: The number of inputs is not a multiple of 32.
    """
    return decode(*encode(values_ECR.to(torch.bfloat16), rule)).to(values_ECR.dtype)
