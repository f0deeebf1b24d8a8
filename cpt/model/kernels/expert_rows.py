"""Rows sorted by expert, as the eager bodies of the experts' operators go through them.

Decisions
    - Operators get the end of each expert's rows on the device, and their kernels find the expert
      of a row from it. The eager bodies of this module may wait for the device instead.
    - Elementwise work is done in fp32 on blocks of rows that fit a cache.
    - Sums over the rows of an expert accumulate in fp32, which an `index_add_` or the backward of
      `bias[expert_ids]` in bf16 does not. They are taken from fp32 copies of a few rows: oneDNN
      keeps compiled code for every shape it has multiplied (0.3 MiB each, up to 1,024 of them), and
      thin products would add three for every number of rows that an expert ever had.

Shape letters: R rows sorted by expert, E experts, N columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

BLOCK_ROWS = {"cpu": 128, "cuda": 16_384}
"""Rows of one elementwise pass: within a core's cache, or enough to fill a GPU without a large fp32
copy.
"""

PIECE_ROWS = 512
"""Rows that are copied to fp32 at a time for a sum."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic is done in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def widen(block: torch.Tensor) -> torch.Tensor:
    """Return a copy in fp32 at least."""
    return block.to(wide_dtype(block.dtype), copy=True)


def blocks(rows: torch.Tensor) -> list[slice]:
    """Return the parts in which elementwise work goes through the rows."""
    size = BLOCK_ROWS[rows.device.type]
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]


def experts_of_rows(ends_E: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the expert of each row, (R,)."""
    rows = torch.arange(num_rows, dtype=ends_E.dtype, device=ends_E.device)
    return torch.searchsorted(ends_E, rows, right=True)


def spans(ends_E: torch.Tensor) -> list[tuple[int, int]]:
    """Return the first row and the end of each expert, for which the host waits."""
    return list(itertools.pairwise([0, *ends_E.tolist()]))


def _pieces(ends_E: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (expert, rows), at most PIECE_ROWS at a time."""
    for expert, (first, end) in enumerate(spans(ends_E)):
        for start in range(first, end, PIECE_ROWS):
            yield expert, slice(start, min(start + PIECE_ROWS, end))


def weighted_sums(
    rows_RN: torch.Tensor, weights_R: torch.Tensor | None, ends_E: torch.Tensor
) -> torch.Tensor:
    """Return per expert the sum of its rows, each times its weight if there are weights: (E, N)."""
    wide = wide_dtype(rows_RN.dtype)
    out_EN = rows_RN.new_zeros(ends_E.numel(), rows_RN.shape[1], dtype=wide)
    for expert, piece in _pieces(ends_E):
        rows = rows_RN[piece].to(wide)
        if weights_R is None:
            out_EN[expert] += rows.sum(0)
        else:
            out_EN[expert] += weights_R[piece].to(wide) @ rows
    return out_EN


def inner(rows_RN: torch.Tensor, vectors_EN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return each row's inner product with the vector of its expert, (R,)."""
    wide = wide_dtype(rows_RN.dtype)
    out_R = rows_RN.new_empty(rows_RN.shape[0], dtype=wide)
    for expert, piece in _pieces(ends_E):
        out_R[piece] = rows_RN[piece].to(wide) @ vectors_EN[expert].to(wide)
    return out_R
