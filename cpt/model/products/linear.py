"""A linear layer whose products with its weight are in 8 bits.

    y  = Q(x) Q(W)^T + bias        dx = Q(d_y) Q(W)        dW = d_y^T x

Q rounds along the axis of the sum, so Q(W) of the second product is another than that of the first.

Shape letters: R rows, I values that go in, O values that come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cpt.model.products.recipe import EightBit


def linear(
    input: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    eight_bit: EightBit | None,
) -> torch.Tensor:
    """Return `F.linear`, its product in 8 bits unless `eight_bit` is None.

    The bias is added afterwards in the working precision.
    """
    if eight_bit is None:
        return F.linear(input, weight_OI, bias_O)
    out = _EightBitLinear.apply(input, weight_OI, eight_bit)
    return out if bias_O is None else out + bias_O


class _EightBitLinear(torch.autograd.Function):
    """(..., I) -> (..., O), without a bias."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight_OI: torch.Tensor, eight_bit: EightBit
    ) -> torch.Tensor:
        rows_RI = input.reshape(-1, input.shape[-1])
        ctx.save_for_backward(rows_RI)
        # not saved: under ZeRO-3 it would hold the gathered storage until the backward
        ctx.held = weight_OI
        ctx.eight_bit = eight_bit
        out_RO = eight_bit.linear_product(rows_RI, weight_OI)
        return out_RO.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows_RI,) = ctx.saved_tensors
        weight_OI = ctx.held
        d_out_RO = grads[0].reshape(-1, grads[0].shape[-1])
        d_input = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows_RI = ctx.eight_bit.linear_product(d_out_RO, weight_OI.t())
            d_input = d_rows_RI.view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            d_weight = d_out_RO.t() @ rows_RI
        return d_input, d_weight, None


class EightBitLinear(nn.Linear):
    """A linear layer that trains in 8 bits, under the names of the layer it replaces."""

    def __init__(self, source: nn.Linear, eight_bit: EightBit) -> None:
        """Take over the parameters of a layer."""
        nn.Module.__init__(self)
        self.in_features = source.in_features
        self.out_features = source.out_features
        self.weight = source.weight
        self.bias = source.bias
        self.eight_bit = eight_bit

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., O) for rows (..., I)."""
        return linear(input, self.weight, self.bias, self.eight_bit if self.training else None)
