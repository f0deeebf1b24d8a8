"""How products of a layer are computed in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.products.e4m3 import Scaling, rounded


@dataclass(frozen=True, slots=True)
class EightBit:
    """Products in E4M3; None in its place stands for the working precision."""

    scaling: Scaling
    """What shares a scale."""

    def left(self, rows_RK: torch.Tensor) -> torch.Tensor:
        """Return the left operand (R, K) as the product sees it, summed along K."""
        return rounded(rows_RK, 1, self.scaling)

    def right(self, matrices_EKN: torch.Tensor) -> torch.Tensor:
        """Return the right operand (E, K, N) as the product sees it, summed along K."""
        return rounded(matrices_EKN, 1, self.scaling)

    def linear_product(self, rows_RK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return rows times the transposed weight, (R, N)."""
        return self.left(rows_RK) @ rounded(weight_NK, 1, self.scaling).t()
