"""Rounding of expert matrices to what MXFP4 has, in place or into another tensor, as an operator.

Passes over memory on a GPU: each weight is read once and written once, 4 bytes a weight in place in
bf16.  Nothing is allocated there.  On a CPU it takes what `mxfp4_rounding.py` says, elsewhere
without a kernel the temporaries of the definition for PIECE_VALUES values.

Shape letters: n experts or any number of pieces, C inputs (columns, a multiple of 32), R outputs.
"""

from __future__ import annotations

import torch

from cpt.config.precision_sections import ExponentRule
from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.weights import mxfp4
from cpt.model.weights.mxfp4_rounding import pieces_of_blocks, round_by_bits

PIECE_VALUES = 2**24
"""Values that a device without the kernel rounds at a time, at least one block of every output."""


def round_blocks(values_nCR: torch.Tensor, rule: ExponentRule) -> torch.Tensor:
    """Return `mxfp4.rounded(values, rule)` as a new tensor, bit for bit; see `round_blocks_`."""
    values_nCR = values_nCR.contiguous()
    out = torch.empty_like(values_nCR)
    _check(values_nCR, out)
    round_mxfp4(values_nCR, rule, out)
    return out


def round_blocks_(values_nCR: torch.Tensor, rule: ExponentRule) -> None:
    """Overwrite values with `mxfp4.rounded(values, rule)`, bit for bit.

    A block with a value that is not finite has none that is finite afterwards; which of them are
    NaN and which infinite depends on the device.

    Args:
        values_nCR: (n, 32 k, R) in bf16 or fp32, contiguous: part of a matrix of experts that
            consists of whole blocks, 32 inputs times all outputs.
        rule: How the exponent of a block is chosen.

    Raises:
        ValueError: The values are not whole blocks in such a layout.
    """
    _check(values_nCR, values_nCR)
    round_mxfp4(values_nCR, rule, values_nCR)


def round_into(values_nCR: torch.Tensor, rule: ExponentRule, out_nCR: torch.Tensor) -> None:
    """Write `mxfp4.rounded(values, rule)` to another tensor of that shape, in bf16 or fp32.

    Raises:
        ValueError: As `round_blocks_`.
    """
    _check(values_nCR, out_nCR)
    round_mxfp4(values_nCR, rule, out_nCR)


def _check(values: torch.Tensor, out: torch.Tensor) -> None:
    if values.dim() != 3 or values.shape[1] % mxfp4.BLOCK or out.shape != values.shape:
        raise ValueError(
            f"Values of shape {tuple(values.shape)} cannot be rounded to MXFP4 into "
            f"{tuple(out.shape)}: they must be (n, inputs, outputs) with a multiple of "
            f"{mxfp4.BLOCK} inputs."
        )
    for tensor in (values, out):
        if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.is_contiguous():
            raise ValueError(
                f"Values in {tensor.dtype} with strides {tensor.stride()} cannot be rounded to "
                "MXFP4: they must be bf16 or fp32, and contiguous."
            )


@torch.library.custom_op("cpt::round_mxfp4", mutates_args=("out_nCR",))
def round_mxfp4(values_nCR: torch.Tensor, rule: str, out_nCR: torch.Tensor) -> None:
    """Write the rounded values; both tensors are as `_check` wants them, and may be the same."""
    if fused_kernels_run_on(values_nCR):
        from cpt.model.kernels import triton_block_rounding

        triton_block_rounding.round_values(values_nCR, rule, out_nCR)
    elif values_nCR.device.type == "cpu":
        round_by_bits(values_nCR, _as_rule(rule), out_nCR)
    else:
        round_by_definition(values_nCR, _as_rule(rule), out_nCR)


@round_mxfp4.register_fake
def _round_mxfp4_shape(values_nCR: torch.Tensor, rule: str, out_nCR: torch.Tensor) -> None:
    return None


def _as_rule(name: str) -> ExponentRule:
    for rule in mxfp4.EXPONENT_RULES:
        if rule == name:
            return rule
    raise ValueError(f"{name} is no rule for exponents; there are {mxfp4.EXPONENT_RULES}.")


def round_by_definition(values: torch.Tensor, rule: ExponentRule, out: torch.Tensor) -> None:
    """Write the rounded values as `mxfp4.rounded` makes them, in pieces; the host does not wait."""
    for piece, place in pieces_of_blocks(values, out, PIECE_VALUES):
        place.copy_(mxfp4.rounded(piece, rule))
