"""A linear layer with an adapter: LoRA, and DoRA as PEFT defines it.

    LoRA    y = x W^T + bias + s (x A^T) B^T
    DoRA    y = g (x W^T + s (x A^T) B^T) + bias,    g = m / |W + s B A|, the norm of each row

Decisions
    - DoRA's norm is a constant for the gradient, as in the paper's section 4.3 and in PEFT
      (peft/tuners/lora/dora.py, DoraLinearLayer), and the bias is not scaled.
    - W + s B A is not formed for it. The square of a row's norm is

          |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        (inner products of rows)

      which takes products with r columns.
    - The norm is rounded to the working precision as the magnitude is, so that their quotient is 1
      where the magnitude is still that of the weight.

Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

Shape letters: B rows, S tokens, I values that go in, O values that come out, r rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from cpt.model.products.linear import linear
from cpt.model.products.recipe import EightBit


class AdaptedLinear(nn.Linear):
    """A frozen linear layer and the adapter beside it, under the names of the layer it replaces."""

    def __init__(self, source: nn.Linear, rank: int, scale: float, *, with_magnitude: bool) -> None:
        """Take over the parameters of a layer, and add those of an adapter, without values.

        Args:
            source: The layer to replace.
            rank: Rank of the adapter.
            scale: Its factor s.
            with_magnitude: Whether the adapter is DoRA.
        """
        nn.Module.__init__(self)
        self.in_features = source.in_features
        self.out_features = source.out_features
        self.weight = source.weight
        self.bias = source.bias
        self.scale = scale
        like = source.weight
        self.lora_A = nn.Parameter(like.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_empty(self.out_features, rank))
        self.eight_bit: EightBit | None = None
        """How training computes products with the weight; None for the working precision."""
        self.lora_magnitude = None
        if with_magnitude:
            self.lora_magnitude = nn.Parameter(like.new_empty(self.out_features))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (B, S, O) for the rows (B, S, I)."""
        added_BSO = F.linear(F.linear(input, self.lora_A), self.lora_B)
        if self.lora_magnitude is None:
            return torch.add(self._frozen(input, self.bias), added_BSO, alpha=self.scale)
        out_BSO = torch.add(self._frozen(input, None), added_BSO, alpha=self.scale)
        norms_O = adapted_row_norms(self.weight, self.lora_A, self.lora_B, self.scale)
        factors_O = self.lora_magnitude.to(norms_O.dtype) / norms_O.to(self.weight.dtype)
        out_BSO = (out_BSO * factors_O).to(input.dtype)
        return out_BSO if self.bias is None else out_BSO + self.bias

    def _frozen(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return (B, S, O) of the layer without its adapter."""
        return linear(input, self.weight, bias, self.eight_bit if self.training else None)


@torch.no_grad()
def adapted_row_norms(
    weight_OI: torch.Tensor, a_rI: torch.Tensor, b_Or: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return |W + s B A| of each row, (O,), in fp32 at least."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    norms_O = row_norms(weight_OI)
    a_wide_rI = a_rI.to(wide)
    b_wide_Or = b_Or.to(wide)
    crossed_Or = F.linear(weight_OI.to(wide), a_wide_rI)
    squared_Or = b_wide_Or @ (a_wide_rI @ a_wide_rI.t())
    added_O = ((2 * scale * crossed_Or + scale * scale * squared_Or) * b_wide_Or).sum(1)
    # A row whose adapter takes nearly all of it away may come out below 0 by rounding.
    change_O = (added_O / norms_O.square()).clamp(min=-1)
    return torch.where(added_O == 0, norms_O, norms_O * (1 + change_O).sqrt())


def row_norms(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, (O,), in fp32 at least."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=wide)
