"""How products of a layer are computed in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.products import scaled
from cpt.model.products.e4m3 import Scaling, rounded


@dataclass(frozen=True, slots=True)
class EightBit:
    """Products in E4M3; None in its place stands for the working precision.

    Shape letters: R rows sorted by expert, E experts, K values along the sum, N columns.
    """

    scaling: Scaling
    """What shares a scale."""
    by_kernel: bool = False
    """Whether a GPU multiplies the codes; otherwise the operands are rounded and multiplied in the
    working precision, which is the definition."""

    def left(self, rows_RK: torch.Tensor) -> torch.Tensor:
        """Return rounded rows (R, K)."""
        return rounded(rows_RK, 1, self.scaling)

    def right(self, matrices_EKN: torch.Tensor) -> torch.Tensor:
        """Return rounded matrices (E, K, N)."""
        return rounded(matrices_EKN, 1, self.scaling)

    def grouped_product(
        self, rows_RK: torch.Tensor, matrices_EKN: torch.Tensor, ends_E: torch.Tensor
    ) -> torch.Tensor:
        """Return each row times the matrix of its expert, (R, N), by the kernel."""
        return scaled.grouped_product(rows_RK, matrices_EKN, ends_E, self.scaling)

    def linear_product(self, rows_RK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return rows times the transposed weight, (R, N)."""
        if self.by_kernel and rows_RK.shape[0] > 0:
            return scaled.linear_product(rows_RK, weight_NK, self.scaling)
        return self.left(rows_RK) @ rounded(weight_NK, 1, self.scaling).t()
