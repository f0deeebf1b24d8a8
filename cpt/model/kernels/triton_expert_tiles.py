"""Tiles of rows that have the same expert, and sums over them, for the Triton kernels.

Decisions
    - Every expert's rows are cut into tiles of ROWS, the last of which may be shorter. The host
      starts as many programs as there can be tiles, ceil(R / ROWS) + E, without knowing the counts;
      those beyond the last tile end at once.
    - A program finds its tile from the ends of the experts' rows, which it reads as a whole: E
      numbers, a small part of a tile. So nothing has to be prepared for a kernel.
    - A sum over an expert's rows has two stages, one sum for each tile and the sum of these, in a
      fixed order and without atomics.

Shape letters: R rows sorted by expert, E experts, N columns, T tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of a tile."""

SUMMED_TILES = 32
"""Tiles that are added at a time: enough reads under way to hide how long one takes."""

SUMMED_COLUMNS = 64
"""Columns of one program of the second stage."""


def num_tiles(num_rows: int, num_experts: int) -> int:
    """Return the largest number of tiles that so many rows can have."""
    return triton.cdiv(num_rows, ROWS) + num_experts


def padded(num_experts: int) -> int:
    """Return the length of a vector of all experts, which Triton wants to be a power of 2."""
    return triton.next_power_of_2(num_experts)


@triton.jit
def _all_experts(
    ends: tl.tensor, num_experts: tl.tensor, ROWS: tl.constexpr, EXPERTS: tl.constexpr
) -> Any:
    """Return first rows, ends and numbers of tiles; those beyond the last expert have no rows."""
    experts = tl.arange(0, EXPERTS)
    exists = experts < num_experts
    stops = tl.load(ends + experts, mask=exists, other=0)
    starts = tl.load(ends + experts - 1, mask=exists & (experts > 0), other=0)
    return starts, stops, (stops - starts + ROWS - 1) // ROWS


@triton.jit
def find_tile(
    ends: tl.tensor,
    num_experts: tl.tensor,
    tile: tl.tensor,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> Any:
    """Return a tile's expert, its first row, and the end of the expert's rows.

    Beyond the last tile, the last two are 0.
    """
    starts, stops, tiles = _all_experts(ends, num_experts, ROWS, EXPERTS)
    tiles_up_to = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
    is_own = tl.arange(0, EXPERTS) == expert
    firsts = starts + (tile - (tiles_up_to - tiles)) * ROWS
    first = tl.sum(tl.where(is_own, firsts, 0), 0)
    stop = tl.sum(tl.where(is_own, stops, 0), 0)
    return expert, first, stop


@triton.jit
def _sum_tiles(
    tile_sums: tl.tensor,
    ends: tl.tensor,
    sums: tl.tensor,
    num_experts: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SUMMED_TILES: tl.constexpr,
    SUMMED_COLUMNS: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    _, _, tiles = _all_experts(ends, num_experts, ROWS, EXPERTS)
    experts = tl.arange(0, EXPERTS)
    first = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    stop = first + tl.sum(tl.where(experts == expert, tiles, 0), 0)
    column = tl.program_id(1) * SUMMED_COLUMNS + tl.arange(0, SUMMED_COLUMNS)
    total = tl.zeros((SUMMED_TILES, SUMMED_COLUMNS), tl.float32)
    while first < stop:
        tile = (first + tl.arange(0, SUMMED_TILES)).to(tl.int64)
        there = (tile < stop)[:, None] & (column < columns)[None, :]
        total += tl.load(tile_sums + tile[:, None] * columns + column[None, :], there, other=0)
        first += SUMMED_TILES
    value = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + expert * columns + column, value, mask=column < columns)


def sum_tiles(tile_sums_TN: torch.Tensor, ends_E: torch.Tensor, sums_EN: torch.Tensor) -> None:
    """Write per expert the sum over its tiles; zero without rows."""
    num_experts, columns = sums_EN.shape
    _sum_tiles[(num_experts, triton.cdiv(columns, SUMMED_COLUMNS))](
        tile_sums_TN,
        ends_E,
        sums_EN,
        num_experts,
        columns,
        ROWS=ROWS,
        EXPERTS=padded(num_experts),
        SUMMED_TILES=SUMMED_TILES,
        SUMMED_COLUMNS=SUMMED_COLUMNS,
    )
