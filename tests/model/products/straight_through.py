"""Layers whose operands are rounded straight through, by autograd: the yardstick of 8-bit layers.

    forward   Q(x) Q(W)      backward   dx = Q(d) Q(W^T),  dW = x^T d

Other products, added with the value 0, carry the gradients.

Shape letters: R rows, K and N the two sizes of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpt.model.experts.function import Activation, Parameters
from cpt.model.products.e4m3 import Scaling, rounded


class _RoundedGradient(torch.autograd.Function):
    """The identity whose gradient is rounded along its last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: Scaling) -> Tensor:
        ctx.scaling = scaling
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return rounded(grads[0], 1, ctx.scaling), None


def product(rows_RK: Tensor, matrix_KN: Tensor, scaling: Scaling) -> Tensor:
    """Return Q(x) Q(W), (R, N), with the gradients above."""
    return _value(rows_RK, matrix_KN, scaling) + _gradients(rows_RK, matrix_KN, scaling)


def _value(rows_RK: Tensor, matrix_KN: Tensor, scaling: Scaling) -> Tensor:
    columns_NK = matrix_KN.detach().t().contiguous()
    return rounded(rows_RK.detach(), 1, scaling) @ rounded(columns_NK, 1, scaling).t()


def _gradients(rows_RK: Tensor, matrix_KN: Tensor, scaling: Scaling) -> Tensor:
    """Return zeros (R, N) that carry the gradients of a product."""
    along_outputs_KN = rounded(matrix_KN.detach().contiguous(), 1, scaling)
    for_rows = _RoundedGradient.apply(rows_RK @ along_outputs_KN, scaling)
    for_matrix = rows_RK.detach() @ matrix_KN
    both = for_rows + for_matrix
    return both - both.detach()


def experts(
    rows_RM: Tensor,
    weights_R: Tensor,
    counts: Sequence[int],
    tensors: Parameters,
    activation: Activation,
    scaling: Scaling,
) -> Tensor:
    """Return the outputs (R, M) of gpt-oss experts by their formulas, expert by expert.

    The weight of a row comes after the product. Its gradients are those of the equal product of
    weight times hidden.
    """
    outputs = []
    of_experts = zip(rows_RM.split(counts), weights_R.split(counts), *tensors, strict=True)
    for rows, weights, gate_up, gate_up_bias, down, down_bias in of_experts:
        sums = product(rows, gate_up, scaling) + gate_up_bias
        gate = sums[:, ::2].clamp(max=activation.limit)
        up = sums[:, 1::2].clamp(-activation.limit, activation.limit)
        hidden = (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
        value = weights.detach()[:, None] * _value(hidden, down, scaling)
        weighted = weights[:, None] * hidden
        outputs.append(value + _gradients(weighted, down, scaling) + weights[:, None] * down_bias)
    return torch.cat(outputs)
