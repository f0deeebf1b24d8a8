"""Rounding of an operand to E4M3 as operators: largest magnitude, scale and code in one pass.

    encode_rows       (N, K) -> codes (N, K)             a row has its values along the sum
    encode_columns    (E, K, N) -> codes (E, N, K)       a column has, and is turned over

Both leave the values along the sum next to each other, as scaled products want them.

Passes over memory on a GPU, for each bf16 value: 2 bytes are read and 1 is written; with one scale
for a whole column it is read twice, the second time from the cache where the tile fits.

Decisions
    - The kernels round with integers and give the eager bodies' bits. So they need no type of 8
      bits from Triton, and its interpreter runs them.

Source of the maths: `cpt.model.products.e4m3`, the eager bodies.

Shape letters: N rows or columns, K values along the sum, E experts, b scales of a row.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.products.e4m3 import BLOCK, Scaling, encode

E4M3 = torch.float8_e4m3fn


@torch.library.custom_op("cpt::encode_rows", mutates_args=())
def encode_rows(values_NK: torch.Tensor, in_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row.

    Args:
        values_NK: Contiguous.
        in_blocks: Whether 32 values share a scale, or a whole row does.

    Returns:
        The codes (N, K) and the scales (N, b), fp32.
    """
    if fused_kernels_run_on(values_NK):
        from cpt.model.kernels import triton_e4m3

        codes_NK, scales_Nb = _new_rows(values_NK, in_blocks)
        triton_e4m3.encode_rows(values_NK, codes_NK, scales_Nb)
        return codes_NK, scales_Nb
    codes_NK, scales_Nb = encode(values_NK, 1, _scaling(in_blocks))
    return codes_NK, scales_Nb.float()


@encode_rows.register_fake
def _new_rows(values_NK: torch.Tensor, in_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, length = values_NK.shape
    scales_Nb = values_NK.new_empty(rows, _num_scales(length, in_blocks), dtype=torch.float32)
    return torch.empty_like(values_NK, dtype=E4M3), scales_Nb


@torch.library.custom_op("cpt::encode_columns", mutates_args=())
def encode_columns(values_EKN: torch.Tensor, in_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each column, and turn the codes over.

    Args:
        values_EKN: Contiguous.
        in_blocks: Whether 32 values share a scale, or a whole column does.

    Returns:
        The codes (E, N, K) and the scales (E, N, b), fp32.
    """
    if fused_kernels_run_on(values_EKN):
        from cpt.model.kernels import triton_e4m3

        codes_ENK, scales_ENb = _new_columns(values_EKN, in_blocks)
        triton_e4m3.encode_columns(values_EKN, codes_ENK, scales_ENb)
        return codes_ENK, scales_ENb
    codes_EKN, scales_EbN = encode(values_EKN, 1, _scaling(in_blocks))
    # bytes are copied: a CPU need not know how to copy codes
    codes_ENK = codes_EKN.view(torch.uint8).transpose(1, 2).contiguous().view(E4M3)
    return codes_ENK, scales_EbN.float().transpose(1, 2).contiguous()


@encode_columns.register_fake
def _new_columns(values_EKN: torch.Tensor, in_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    experts, length, columns = values_EKN.shape
    codes_ENK = values_EKN.new_empty(experts, columns, length, dtype=E4M3)
    scales_shape = (experts, columns, _num_scales(length, in_blocks))
    return codes_ENK, values_EKN.new_empty(scales_shape, dtype=torch.float32)


def _num_scales(length: int, in_blocks: bool) -> int:
    return length // BLOCK if in_blocks else 1


def _scaling(in_blocks: bool) -> Scaling:
    return "blocks" if in_blocks else "rows"
