"""Products of rows sorted by expert with one matrix per expert.

Decisions
    `torch._grouped_mm` does the work where it is right: bf16 on CUDA from compute capability 8.0, bf16 and fp32 on the
    CPU, rows that start on 16 bytes.  It takes the ends of the groups from the device, so nothing waits for the host.
    Elsewhere (float64, odd sizes, no rows at all) a loop over the experts does the same.
    Rows are never padded.  An expert without rows has zero gradients.
    Sums over the rows of an expert are products with a column of ones: they accumulate in fp32 inside the product,
    which an `index_add_` or the backward of `bias[expert_ids]` in bf16 does not.

Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

ALIGNMENT_BYTES = 16
"""Where the grouped kernels want every row of an operand to start."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which expert."""

    counts_E: torch.Tensor
    """Rows of each expert, int64, on the device of the rows."""
    ends_E: torch.Tensor = field(init=False)
    """First row after each expert's, int32 as the kernels want it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_E", self.counts_E.cumsum(0, dtype=torch.int32))

    def experts_of_rows(self, num_rows: int) -> torch.Tensor:
        """(R,) expert of each row."""
        experts = torch.arange(self.counts_E.numel(), device=self.counts_E.device)
        return experts.repeat_interleave(self.counts_E, output_size=num_rows)

    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each expert, on the host: for the loop only."""
        return list(itertools.pairwise([0, *self.ends_E.tolist()]))


def is_served(rows: torch.Tensor, *sizes: int) -> bool:
    """Whether `torch._grouped_mm` can do these products; `sizes` are the row lengths of all operands."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    if rows.device.type == "cuda":
        dtypes = (torch.bfloat16,) if torch.cuda.get_device_capability(rows.device) >= (8, 0) else ()
    aligned = all(size * rows.element_size() % ALIGNMENT_BYTES == 0 for size in sizes)
    return rows.dtype in dtypes and aligned and rows.shape[0] > 0


def product(rows_RK: torch.Tensor, matrices_EKN: torch.Tensor, groups: Groups, *, grouped: bool) -> torch.Tensor:
    """(R, N): each row times the matrix of its expert."""
    if grouped:
        return torch._grouped_mm(rows_RK, matrices_EKN, offs=groups.ends_E)
    out_RN = rows_RK.new_empty(rows_RK.shape[0], matrices_EKN.shape[2])
    for (first, end), matrix_KN in zip(groups.spans(), matrices_EKN, strict=True):
        torch.mm(rows_RK[first:end], matrix_KN, out=out_RN[first:end])
    return out_RN


def outer(left_RK: torch.Tensor, right_RN: torch.Tensor, groups: Groups, *, grouped: bool) -> torch.Tensor:
    """(E, K, N): per expert the sum over its rows of left^T right; zero for an expert without rows."""
    if grouped:
        out_EKN = torch._grouped_mm(left_RK.t(), right_RN, offs=groups.ends_E)
        if out_EKN.device.type == "cuda":  # what the kernel leaves where there are no rows is not promised
            out_EKN.masked_fill_((groups.counts_E == 0)[:, None, None], 0)
        return out_EKN
    out_EKN = left_RK.new_empty(groups.counts_E.numel(), left_RK.shape[1], right_RN.shape[1])
    for (first, end), part_KN in zip(groups.spans(), out_EKN, strict=True):
        torch.mm(left_RK[first:end].t(), right_RN[first:end], out=part_KN)
    return out_EKN


def weighted_sums(
    rows_RN: torch.Tensor, weights_R: torch.Tensor | None, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """(E, N): per expert the sum of its rows, each times its weight if there are weights."""
    column_RK = rows_RN.new_zeros(rows_RN.shape[0], _aligned_columns(rows_RN))
    column_RK[:, 0] = 1 if weights_R is None else weights_R
    return outer(column_RK, rows_RN, groups, grouped=grouped)[:, 0]


def inner(rows_RN: torch.Tensor, vectors_EN: torch.Tensor, groups: Groups, *, grouped: bool) -> torch.Tensor:
    """(R,): each row's inner product with the vector of its expert."""
    column_ENK = vectors_EN.new_zeros(*vectors_EN.shape, _aligned_columns(rows_RN))
    column_ENK[..., 0] = vectors_EN
    return product(rows_RN, column_ENK, groups, grouped=grouped)[:, 0]


def _aligned_columns(like: torch.Tensor) -> int:
    return ALIGNMENT_BYTES // like.element_size()
