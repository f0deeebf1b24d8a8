"""Decoding of MXFP4 expert matrices into a scratch, as an operator.

Passes over memory on a GPU: the codes are read once and the values written once, 2.53 bytes a
weight in bf16.  The eager body makes one more copy, which puts the values into their places.

Shape letters: E experts, R output rows, C inputs (columns), b blocks of a row (C / 32).
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.weights import mxfp4


@torch.library.custom_op("cpt::decode_mxfp4", mutates_args=())
def decode_mxfp4(
    blocks_ERb16: torch.Tensor, scales_ERb: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the values (E, C, R), contiguous; see `cpt.model.weights.mxfp4`.

    Args:
        blocks_ERb16: Two codes a byte; contiguous.
        scales_ERb: The exponent of each block; contiguous.
        dtype: bf16, fp32 or float64; every value is exact in each of them.
    """
    if dtype != torch.float64 and fused_kernels_run_on(blocks_ERb16):
        from cpt.model.kernels import triton_packed_weights

        values_ECR = _new_values(blocks_ERb16, dtype)
        triton_packed_weights.decode(blocks_ERb16, scales_ERb, values_ECR)
        return values_ECR
    return mxfp4.decode(blocks_ERb16, scales_ERb, dtype)


@decode_mxfp4.register_fake
def _decoded_shape(
    blocks_ERb16: torch.Tensor, scales_ERb: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _new_values(blocks_ERb16, dtype)


def _new_values(blocks_ERb16: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    experts, rows, num_blocks, _ = blocks_ERb16.shape
    return blocks_ERb16.new_empty(experts, num_blocks * mxfp4.BLOCK, rows, dtype=dtype)
