"""Torch's scaled products on a GPU: the kernels of 8-bit products.

    experts         torch._scaled_grouped_mm
    linear layers   torch._scaled_mm

Scales of rows are fp32 numbers. Those of blocks are e8m0 bytes, which lie in tiles of 128 x 4.

A tile of scales holds those of 128 rows and of 4 blocks of each; in memory row r, block c is

    (r % 32) * 16 + (r // 32) * 4 + c

The rows of each expert fill tiles of their own. Where they begin is computed on the device.

None of these kernels has been run by this project: the start-up probe and the acceptance run
compare them with the emulation.

Sources: torch's aten/src/ATen/native/cuda/GroupedBlas.cpp and ScaledBlas.cpp for devices, strides
and shapes; "1D Block Scaling Factors Layout" of cuBLAS's documentation for the tiles.

Shape letters: R rows sorted by expert, E experts, K values along the sum, N columns, b scales of
each.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.e4m3 import encode_columns, encode_rows
from cpt.model.products.e4m3 import Scaling

TILE_ROWS = 128
TILE_BLOCKS = 4

FAST_ACCUMULATION = False
"""Whether Hopper may keep sums in 14 bits: the emulation adds up in fp32."""


def grouped_product(
    rows_RK: torch.Tensor, matrices_EKN: torch.Tensor, ends_E: torch.Tensor, scaling: Scaling
) -> torch.Tensor:
    """Return each row times the matrix of its expert, (R, N) in bf16.

    Args:
        rows_RK: Rows sorted by expert, bf16.
        matrices_EKN: Contiguous, or the transposed view of such.
        ends_E: First row after each expert's, int32.
        scaling: What shares a scale.
    """
    codes_RK, scales_Rb = encode_rows(rows_RK.contiguous(), scaling == "blocks")
    right_ENK, right_scales_ENb = _right_operand(matrices_EKN, scaling)
    if scaling == "rows":
        scales = scales_Rb.flatten(), right_scales_ENb.squeeze(2)
    else:
        tiles_of_rows = _tiled_by_expert(_as_e8m0(scales_Rb), ends_E)
        right_tiles = _tiled(_as_e8m0(right_scales_ENb))
        scales = tiles_of_rows, right_tiles.flatten(1)
    return torch._scaled_grouped_mm(
        codes_RK,
        right_ENK.transpose(1, 2),
        *scales,
        offs=ends_E,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )


def linear_product(
    rows_RK: torch.Tensor, weight_NK: torch.Tensor, scaling: Scaling
) -> torch.Tensor:
    """Return rows times the transposed weight, (R, N) in bf16.

    Args:
        rows_RK: bf16.
        weight_NK: Contiguous, or the transposed view of such.
        scaling: What shares a scale.
    """
    codes_RK, scales_Rb = encode_rows(rows_RK.contiguous(), scaling == "blocks")
    right_1NK, right_scales_1Nb = _right_operand(weight_NK.t()[None], scaling)
    if scaling == "rows":
        scales = scales_Rb, right_scales_1Nb[0].t()
    else:
        tiles = _tiled(_as_e8m0(scales_Rb)[None])
        scales = tiles.flatten(), _tiled(_as_e8m0(right_scales_1Nb)).flatten()
    return torch._scaled_mm(
        codes_RK,
        right_1NK[0].t(),
        *scales,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )


def _right_operand(
    matrices_EKN: torch.Tensor, scaling: Scaling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes (E, N, K) and the scales (E, N, b) of matrices."""
    in_blocks = scaling == "blocks"
    turned_ENK = matrices_EKN.transpose(1, 2)
    if not turned_ENK.is_contiguous():
        return encode_columns(matrices_EKN.contiguous(), in_blocks)
    codes, scales = encode_rows(turned_ENK.flatten(0, 1), in_blocks)
    return codes.view(turned_ENK.shape), scales.view(*turned_ENK.shape[:2], -1)


def _as_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Return powers of two, and NaN, as bytes of e8m0: the exponent bits of fp32."""
    return (scales.view(torch.int32) >> 23).to(torch.uint8)


def _num_tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _tiled(bytes_ENb: torch.Tensor) -> torch.Tensor:
    """Put the scales of matrices into tiles, (E, rows of whole tiles, blocks of whole tiles)."""
    experts, num_rows, num_blocks = bytes_ENb.shape
    across = _num_tiles(num_blocks, TILE_BLOCKS)
    down = _num_tiles(num_rows, TILE_ROWS)
    padded = bytes_ENb.new_zeros(experts, down * TILE_ROWS, across * TILE_BLOCKS)
    padded[:, :num_rows, :num_blocks] = bytes_ENb
    tiles = padded.view(experts, down, 4, 32, across, TILE_BLOCKS)
    ordered = tiles.permute(0, 1, 4, 3, 2, 5).contiguous()
    return ordered.view(padded.shape).view(torch.float8_e8m0fnu)


def _tiled_by_expert(bytes_Rb: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Put the scales of rows into tiles that begin anew with each expert.

    Returns:
        As many rows as there are at most, R + 127 E, and whole tiles of blocks.
    """
    num_rows, num_blocks = bytes_Rb.shape
    experts = ends_E.numel()
    across = _num_tiles(num_blocks, TILE_BLOCKS)
    most_rows = _num_tiles(num_rows + experts * (TILE_ROWS - 1), TILE_ROWS) * TILE_ROWS
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    tiles_E = (ends_E - starts_E + TILE_ROWS - 1) // TILE_ROWS
    first_tile_E = tiles_E.cumsum(0) - tiles_E
    row_R = torch.arange(num_rows, device=bytes_Rb.device)
    expert_R = torch.searchsorted(ends_E, row_R.to(ends_E.dtype), right=True)
    inside_R = row_R - starts_E[expert_R]
    tile_R = first_tile_E[expert_R] + inside_R // TILE_ROWS
    within_R = inside_R % TILE_ROWS
    block_b = torch.arange(num_blocks, device=bytes_Rb.device)
    tile_Rb = tile_R[:, None] * across + block_b // TILE_BLOCKS
    in_tile_R = within_R % 32 * 16 + within_R // 32 * TILE_BLOCKS
    place_Rb = tile_Rb * (TILE_ROWS * TILE_BLOCKS) + in_tile_R[:, None] + block_b % TILE_BLOCKS
    placed = bytes_Rb.new_zeros(most_rows, across * TILE_BLOCKS)
    placed.view(-1)[place_Rb] = bytes_Rb
    return placed.view(torch.float8_e8m0fnu)
