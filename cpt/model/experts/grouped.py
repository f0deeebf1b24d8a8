"""Products of rows sorted by expert with one matrix per expert.

Decisions
    - `torch._grouped_mm` does the work where it is right: bf16 on CUDA from compute capability 8.0,
      bf16 and fp32 on the CPU, rows that start on 16 bytes. It reads the ends of the groups on the
      device, so the host does not wait. Elsewhere (float64, odd sizes, no rows at all) a loop over
      the experts does the same.
    - Rows are never padded. An expert without rows has zero gradients.
    - Sums over the rows of an expert accumulate in fp32, which an `index_add_` or the backward of
      `bias[expert_ids]` in bf16 does not. On a GPU they are grouped products with a column of ones.
    - On a CPU these sums are taken from fp32 copies of a few rows: oneDNN keeps compiled code for
      every shape it has multiplied (0.3 MiB each, up to 1,024 of them), and thin products would add
      three for every number of rows that an expert ever had.

Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

ALIGNMENT_BYTES = 16
"""The grouped kernels want every row of an operand to start at a multiple of this."""

PIECE_ROWS = 512
"""Rows that are copied to fp32 at a time."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The division of rows, sorted by expert, among the experts."""

    counts_E: torch.Tensor
    """The number of rows of each expert, int64, on the device of the rows."""
    ends_E: torch.Tensor = field(init=False)
    """First row after each expert's, int32 as the kernels want it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_E", self.counts_E.cumsum(0, dtype=torch.int32))

    def experts_of_rows(self, num_rows: int) -> torch.Tensor:
        """Return the expert of each row, (R,)."""
        experts = torch.arange(self.counts_E.numel(), device=self.counts_E.device)
        return experts.repeat_interleave(self.counts_E, output_size=num_rows)

    def spans(self) -> list[tuple[int, int]]:
        """Return the first row and the end of each expert, on the host; for the loop only."""
        return list(itertools.pairwise([0, *self.ends_E.tolist()]))

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Yield (expert, rows), at most PIECE_ROWS at a time, on the host."""
        for expert, (first, end) in enumerate(self.spans()):
            for start in range(first, end, PIECE_ROWS):
                yield expert, slice(start, min(start + PIECE_ROWS, end))


def is_served(rows: torch.Tensor, *sizes: int) -> bool:
    """Return whether `torch._grouped_mm` serves operands whose rows have these lengths."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    if rows.device.type == "cuda":
        dtypes = (torch.bfloat16,)
        if torch.cuda.get_device_capability(rows.device) < (8, 0):
            dtypes = ()
    aligned = all(size * rows.element_size() % ALIGNMENT_BYTES == 0 for size in sizes)
    return rows.dtype in dtypes and aligned and rows.shape[0] > 0


def product(
    rows_RK: torch.Tensor, matrices_EKN: torch.Tensor, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """Return each row times the matrix of its expert, (R, N)."""
    if grouped:
        return torch._grouped_mm(rows_RK, matrices_EKN, offs=groups.ends_E)
    out_RN = rows_RK.new_empty(rows_RK.shape[0], matrices_EKN.shape[2])
    for (first, end), matrix_KN in zip(groups.spans(), matrices_EKN, strict=True):
        torch.mm(rows_RK[first:end], matrix_KN, out=out_RN[first:end])
    return out_RN


def outer(
    left_RK: torch.Tensor, right_RN: torch.Tensor, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """Return per expert the sum over its rows of left^T right, (E, K, N); zero without rows."""
    if grouped:
        out_EKN = torch._grouped_mm(left_RK.t(), right_RN, offs=groups.ends_E)
        if out_EKN.device.type == "cuda":
            # The kernel does not promise what it leaves where there are no rows.
            out_EKN.masked_fill_((groups.counts_E == 0)[:, None, None], 0)
        return out_EKN
    out_EKN = left_RK.new_empty(groups.counts_E.numel(), left_RK.shape[1], right_RN.shape[1])
    for (first, end), part_KN in zip(groups.spans(), out_EKN, strict=True):
        torch.mm(left_RK[first:end].t(), right_RN[first:end], out=part_KN)
    return out_EKN


def weighted_sums(
    rows_RN: torch.Tensor, weights_R: torch.Tensor | None, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """Return per expert the sum of its rows, each times its weight if there are weights: (E, N)."""
    if grouped and rows_RN.is_cuda:
        return thin_sums(rows_RN, weights_R, groups)
    wide = wide_dtype(rows_RN.dtype)
    out_EN = rows_RN.new_zeros(groups.counts_E.numel(), rows_RN.shape[1], dtype=wide)
    for expert, piece in groups.pieces():
        rows = rows_RN[piece].to(wide)
        if weights_R is None:
            out_EN[expert] += rows.sum(0)
        else:
            out_EN[expert] += weights_R[piece].to(wide) @ rows
    return out_EN


def thin_sums(
    rows_RN: torch.Tensor, weights_R: torch.Tensor | None, groups: Groups
) -> torch.Tensor:
    """Return `weighted_sums` by a grouped product, for which the host does not wait."""
    column_RK = rows_RN.new_zeros(rows_RN.shape[0], _aligned_columns(rows_RN))
    column_RK[:, 0] = 1 if weights_R is None else weights_R
    return outer(column_RK, rows_RN, groups, grouped=True)[:, 0]


def inner(
    rows_RN: torch.Tensor, vectors_EN: torch.Tensor, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """Return each row's inner product with the vector of its expert, (R,)."""
    if grouped and rows_RN.is_cuda:
        return thin_inner(rows_RN, vectors_EN, groups)
    wide = wide_dtype(rows_RN.dtype)
    out_R = rows_RN.new_empty(rows_RN.shape[0], dtype=wide)
    for expert, piece in groups.pieces():
        out_R[piece] = rows_RN[piece].to(wide) @ vectors_EN[expert].to(wide)
    return out_R


def thin_inner(rows_RN: torch.Tensor, vectors_EN: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return `inner` by a grouped product, for which the host does not wait."""
    column_ENK = vectors_EN.new_zeros(*vectors_EN.shape, _aligned_columns(rows_RN))
    column_ENK[..., 0] = vectors_EN
    return product(rows_RN, column_ENK, groups, grouped=True)[:, 0]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are taken in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _aligned_columns(like: torch.Tensor) -> int:
    return ALIGNMENT_BYTES // like.element_size()
