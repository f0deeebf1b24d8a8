"""Products of rows sorted by expert with one matrix per expert.

Decisions
    - `torch._grouped_mm` does the work where it is right: bf16 on CUDA from compute capability 8.0,
      bf16 and fp32 on the CPU, rows that start on 16 bytes. It reads the ends of the groups on the
      device, so the host does not wait. Elsewhere (float64, odd sizes, no rows at all) a loop over
      the experts does the same.
    - On a GPU rows are never padded; on a CPU those in bf16 are (padded_products.py). An expert
      without rows has zero gradients.
    - Matrices may be packed (packed.py). They are decoded here, a few experts at a time.
    - On a GPU matrices that start elsewhere are copied for a product. ZeRO-3 has its parts of all
      parameters behind each other. Where one rank alone has an expert, its part is the matrix, and
      that begins wherever the parts before it end: in gpt-oss on 16 ranks and more.
    - A product may be in 8 bits (cpt/model/products). Packed matrices are decoded before that.

Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from cpt.model.experts.packed import Matrices, PackedMatrices
from cpt.model.experts.padded_products import padded_outer, padded_product, pads
from cpt.model.kernels.empty_experts import clear_empty_experts
from cpt.model.kernels.expert_rows import spans
from cpt.model.products.recipe import EightBit

ALIGNMENT_BYTES = 16
"""The grouped kernels want every row of an operand to start at a multiple of this."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The division of rows, sorted by expert, among the experts."""

    counts_E: torch.Tensor
    """The number of rows of each expert, int64, on the device of the rows."""
    ends_E: torch.Tensor = field(init=False)
    """First row after each expert's, int32 as the kernels want it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_E", self.counts_E.cumsum(0, dtype=torch.int32))


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
    rows_RK: torch.Tensor,
    matrices_EKN: Matrices,
    groups: Groups,
    *,
    grouped: bool,
    eight_bit: EightBit | None = None,
) -> torch.Tensor:
    """Return each row times the matrix of its expert, (R, N)."""
    if rows_RK.shape[0] == 0:
        return rows_RK.new_empty(0, matrices_EKN.shape[2])
    if isinstance(matrices_EKN, PackedMatrices):
        return _product_with_packed(rows_RK, matrices_EKN, groups, grouped, eight_bit)
    if eight_bit is not None:
        if eight_bit.by_kernel:
            return eight_bit.grouped_product(rows_RK, matrices_EKN, groups.ends_E)
        rows_RK = eight_bit.left(rows_RK)
        matrices_EKN = eight_bit.right(matrices_EKN)
    if grouped and pads(rows_RK):
        return padded_product(rows_RK, matrices_EKN, groups.ends_E)
    if grouped:
        return torch._grouped_mm(rows_RK, _aligned(matrices_EKN), offs=groups.ends_E)
    out_RN = rows_RK.new_empty(rows_RK.shape[0], matrices_EKN.shape[2])
    for (first, end), matrix_KN in zip(spans(groups.ends_E), matrices_EKN, strict=True):
        torch.mm(rows_RK[first:end], matrix_KN, out=out_RN[first:end])
    return out_RN


def _aligned(matrices_EKN: torch.Tensor) -> torch.Tensor:
    """Return the matrices, or a copy of those on a GPU that the grouped kernel would refuse.

    The start of a storage is aligned, so its offset tells, also where there is no memory at all.
    """
    start_bytes = matrices_EKN.storage_offset() * matrices_EKN.element_size()
    if matrices_EKN.is_cuda and start_bytes % ALIGNMENT_BYTES != 0:
        return matrices_EKN.clone()
    return matrices_EKN


def _product_with_packed(
    rows_RK: torch.Tensor,
    packed_EKN: PackedMatrices,
    groups: Groups,
    grouped: bool,
    eight_bit: EightBit | None,
) -> torch.Tensor:
    """Return each row times the matrix of its expert, (R, N), decoding the matrices in pieces."""
    multiply = partial(product, grouped=grouped, eight_bit=eight_bit)
    counts_E = groups.counts_E
    if not rows_RK.is_cuda or rows_RK.shape[0] < counts_E.numel():
        present = counts_E.nonzero().flatten()
        if present.numel() < counts_E.numel():
            packed_EKN = packed_EKN[present]
            counts_E = counts_E[present]
            groups = Groups(counts_E)
    size = packed_EKN.experts_at_a_time(rows_RK.dtype)
    if size >= counts_E.numel():
        return multiply(rows_RK, packed_EKN.decoded(rows_RK.dtype), groups)
    of_experts = spans(groups.ends_E)
    out_RN = rows_RK.new_empty(rows_RK.shape[0], packed_EKN.shape[2])
    for first in range(0, len(of_experts), size):
        piece = slice(first, first + size)
        rows = slice(of_experts[piece][0][0], of_experts[piece][-1][1])
        if rows.start == rows.stop:
            continue
        decoded = packed_EKN[piece].decoded(rows_RK.dtype)
        out_RN[rows] = multiply(rows_RK[rows], decoded, Groups(counts_E[piece]))
        del decoded  # before the next piece takes as much
    return out_RN


def outer(
    left_RK: torch.Tensor, right_RN: torch.Tensor, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    """Return per expert the sum over its rows of left^T right, (E, K, N); zero without rows."""
    if grouped and pads(left_RK):
        return padded_outer(left_RK, right_RN, groups.ends_E)
    if grouped:
        out_EKN = torch._grouped_mm(left_RK.t(), right_RN, offs=groups.ends_E)
        if out_EKN.is_cuda:
            clear_empty_experts(out_EKN, groups.counts_E)
        return out_EKN
    out_EKN = left_RK.new_empty(groups.counts_E.numel(), left_RK.shape[1], right_RN.shape[1])
    for (first, end), part_KN in zip(spans(groups.ends_E), out_EKN, strict=True):
        torch.mm(left_RK[first:end].t(), right_RN[first:end], out=part_KN)
    return out_EKN
