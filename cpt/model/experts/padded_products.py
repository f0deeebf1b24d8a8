"""Grouped products in bf16 on a CPU, over few different numbers of rows.

oneDNN compiles a product anew for every number of rows that it has not met, or has forgotten. That
takes milliseconds where the product of one expert takes a tenth of one, and `torch._grouped_mm`
hands over the rows of each expert as the router has divided them. Here their number is rounded up
to one of eight sizes between two powers of two, of which oneDNN soon knows all.

Decisions
    - A product takes rows of the experts before as well, as many as are missing, and those results
      are written over afterwards: experts are gone through from the last to the first. Nothing is
      copied, but for experts that have too few rows before them.
    - A sum over rows takes copies that end with rows of zeros.
    - The results of a row depend on the number of rows of its expert and on nothing else that
      belongs to other rows. They are those of the product of the rows alone, up to the order in
      which a kernel for another number of rows adds in fp32.

Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix, P rows of one
expert, rounded up.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.expert_rows import spans

SMALLEST_ROWS = 16
"""What rows are rounded up to multiples of, at least: the rows of a tile of AMX."""
SIZES_BETWEEN_POWERS = 8
"""How many sizes there are from one power of two to the next: under 1/8 of the rows are added."""


def pads(rows: torch.Tensor) -> bool:
    """Return whether these are rows whose products are computed here."""
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16


def padded_size(num_rows: int) -> int:
    """Return the number of rows that this number of rows is rounded up to; 0 stays 0."""
    power = 1 << max(num_rows - 1, 0).bit_length()
    step = max(SMALLEST_ROWS, power // (2 * SIZES_BETWEEN_POWERS))
    return -(-num_rows // step) * step


def padded_product(
    rows_RK: torch.Tensor, matrices_EKN: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """Return each row times the matrix of its expert, (R, N)."""
    out_RN = rows_RK.new_empty(rows_RK.shape[0], matrices_EKN.shape[2])
    of_experts = spans(ends_E)
    for expert in reversed(range(len(of_experts))):
        first, end = of_experts[expert]
        size = padded_size(end - first)
        if size == 0:
            continue
        start = end - size
        if start >= 0:
            torch.mm(rows_RK[start:end], matrices_EKN[expert], out=out_RN[start:end])
        else:
            rows_PK = rows_RK.new_zeros(size, rows_RK.shape[1])
            # at the end, as rows of other experts would stand before them
            rows_PK[first - end :] = rows_RK[first:end]
            out_RN[first:end] = torch.mm(rows_PK, matrices_EKN[expert])[first - end :]
    return out_RN


def padded_outer(
    left_RK: torch.Tensor, right_RN: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """Return per expert the sum over its rows of left^T right, (E, K, N); zero without rows."""
    out_EKN = left_RK.new_empty(ends_E.numel(), left_RK.shape[1], right_RN.shape[1])
    for (first, end), part_KN in zip(spans(ends_E), out_EKN, strict=True):
        size = padded_size(end - first)
        if size == 0:
            part_KN.zero_()
            continue
        left_PK = _with_zeros(left_RK[first:end], size)
        right_PN = _with_zeros(right_RN[first:end], size)
        torch.mm(left_PK.t(), right_PN, out=part_KN)
    return out_EKN


def _with_zeros(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return the rows, followed by zeros up to a number of rows."""
    num_rows = rows.shape[0]
    if num_rows == size:
        return rows
    padded = rows.new_empty(size, rows.shape[1])
    padded[:num_rows] = rows
    padded[num_rows:] = 0
    return padded
