"""The Triton kernel of packed_weights.py: one program for a tile of rows and blocks of an expert.

A tile is read along its rows and written along its columns, so it is turned over on the way.

Shape letters: E experts, R output rows, C inputs (columns), b blocks of a row (C / 32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpt.model.weights.mxfp4 import BLOCK

ROWS = 64
"""Rows of a tile: as many values are written in a piece, 128 bytes in bf16."""

TILE_BLOCKS = 4
"""Blocks of a tile in each row: 64 bytes of codes are read in a piece."""

WARPS = 4
"""Warps of a program."""


@triton.jit
def _magnitude(code: tl.tensor) -> tl.tensor:
    """Return the magnitude of a code (sign, two bits of exponent, one of mantissa) in fp32."""
    exponent = (code & 7) >> 1
    mantissa = (code & 1).to(tl.float32)
    # 0 and 0.5 have no leading one
    whole = (1 << exponent).to(tl.float32) * (0.5 + 0.25 * mantissa)
    return tl.where(exponent == 0, 0.5 * mantissa, whole)


@triton.jit
def _decode(
    blocks: tl.tensor,
    scales: tl.tensor,
    bits_of_values: tl.tensor,
    num_rows: tl.tensor,
    num_blocks: tl.tensor,
    ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_BF16: tl.constexpr,
) -> None:
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_block = tl.program_id(1) * TILE_BLOCKS
    block = first_block + tl.arange(0, TILE_BLOCKS)
    byte = first_block * (BLOCK // 2) + tl.arange(0, TILE_BLOCKS * (BLOCK // 2))
    num_bytes = num_blocks * (BLOCK // 2)
    row_of_all = expert * num_rows + row

    byte_places = row_of_all[:, None] * num_bytes + byte[None, :]
    byte_inside = (row < num_rows)[:, None] & (byte < num_bytes)[None, :]
    pair = tl.load(blocks + byte_places, mask=byte_inside, other=0).to(tl.int32)
    scale_places = row_of_all[:, None] * num_blocks + block[None, :]
    scale_inside = (row < num_rows)[:, None] & (block < num_blocks)[None, :]
    scale = tl.load(scales + scale_places, mask=scale_inside, other=0).to(tl.int32)
    # the bits of 2^(scale - 127) in fp32; 2^-127 is below the smallest normal number
    factor = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)

    code = tl.reshape(tl.join(pair & 15, pair >> 4), (ROWS, TILE_BLOCKS, BLOCK))
    size = _magnitude(code) * factor[:, :, None]
    # the sign is a bit, because a zero may have one, too
    bits = size.to(tl.int32, bitcast=True) | ((code >> 3) << 31)
    turned = tl.trans(tl.reshape(bits, (ROWS, TILE_BLOCKS * BLOCK)))
    if IN_BF16:
        turned = turned >> 16

    column = first_block * BLOCK + tl.arange(0, TILE_BLOCKS * BLOCK)
    num_columns = num_blocks * BLOCK
    places = (expert * num_columns + column)[:, None] * num_rows + row[None, :]
    inside = (column < num_columns)[:, None] & (row < num_rows)[None, :]
    tl.store(bits_of_values + places, turned.to(bits_of_values.dtype.element_ty), mask=inside)


def decode(blocks_ERb16: torch.Tensor, scales_ERb: torch.Tensor, values_ECR: torch.Tensor) -> None:
    """Write the values in fp32 or bf16; see `decode_mxfp4`.

    They are written as bits: those of an exact bf16 number are the upper half of those in fp32.
    """
    assert blocks_ERb16.is_contiguous() and scales_ERb.is_contiguous()
    assert values_ECR.is_contiguous()
    experts, rows, num_blocks, _ = blocks_ERb16.shape
    if values_ECR.numel() == 0:
        return
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(num_blocks, TILE_BLOCKS), experts)
    in_bf16 = values_ECR.dtype == torch.bfloat16
    _decode[grid](
        blocks_ERb16,
        scales_ERb,
        values_ECR.view(torch.int16 if in_bf16 else torch.int32),
        rows,
        num_blocks,
        ROWS=ROWS,
        TILE_BLOCKS=TILE_BLOCKS,
        BLOCK=BLOCK,
        IN_BF16=in_bf16,
        num_warps=WARPS,
    )
