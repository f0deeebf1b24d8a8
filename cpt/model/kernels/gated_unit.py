"""The gated unit of gpt-oss's experts with its bias, forward and backward, as operators.

    gate, up = even, odd columns of gate_up + bias, clamped
    hidden   = (up + 1) * gate * sigmoid(alpha * gate)

Passes over memory on a GPU: `gated_unit` reads gate_up and writes hidden. `gated_unit_backward`
reads and writes gate_up and d_hidden once each; for the gradient of the bias it also writes and
reads fp32 sums of every 16 rows, a quarter of a pass over gate_up in bf16.
`gated_unit_backward_into` does the same for part of the rows and writes into buffers of all rows.

Shape letters: R rows sorted by expert, I expert size, E experts.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.kernels.expert_rows import (
    blocks,
    experts_of_rows,
    weighted_sums,
    wide_dtype,
    widen,
)


@torch.library.custom_op("cpt::gated_unit", mutates_args=())
def gated_unit(
    gate_up_R2I: torch.Tensor,
    bias_E2I: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """Return `hidden`, (R, I).

    Args:
        gate_up_R2I: Columns that are gate and up in turn, without their bias; contiguous.
        bias_E2I: The bias of each expert.
        ends_E: First row after each expert's, int32.
        alpha: Steepness of the sigmoid.
        limit: The value at which gate (from above) and up (on both sides) are clamped.
    """
    hidden_RI = _new_hidden(gate_up_R2I)
    if fused_kernels_run_on(gate_up_R2I):
        from cpt.model.kernels import triton_gated_unit

        triton_gated_unit.forward(gate_up_R2I, bias_E2I, ends_E, alpha, limit, hidden_RI)
        return hidden_RI
    experts_R = experts_of_rows(ends_E, gate_up_R2I.shape[0])
    for block in blocks(gate_up_R2I):
        gate_up = widen(gate_up_R2I[block]).add_(bias_E2I[experts_R[block]])
        hidden_RI[block] = _forward(gate_up, alpha, limit)
    return hidden_RI


@gated_unit.register_fake
def _gated_unit_shape(
    gate_up_R2I: torch.Tensor,
    bias_E2I: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    return _new_hidden(gate_up_R2I)


@torch.library.custom_op("cpt::gated_unit_backward", mutates_args=("gate_up_R2I", "d_hidden_RI"))
def gated_unit_backward(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go back from hidden to gate_up, in place.

    Args:
        gate_up_R2I: As in the forward; overwritten with its gradient.
        d_hidden_RI: Gradient of hidden, not yet times the weight of its row; overwritten with
            hidden times that weight.
        bias_E2I: The bias of each expert.
        weights_R: Routing weight of each row.
        ends_E: First row after each expert's, int32.
        alpha: Steepness of the sigmoid.
        limit: The value at which gate and up are clamped.
        need_bias: Whether the gradient of the bias is wanted.

    Returns:
        <d_hidden, hidden> of each row in fp32, and the gradient of the bias in its dtype; an empty
        tensor in its place if it is not wanted.
    """
    return _go_back(
        gate_up_R2I,
        d_hidden_RI,
        bias_E2I,
        weights_R,
        ends_E,
        alpha,
        limit,
        gate_up_R2I,
        d_hidden_RI,
        need_bias,
    )


@gated_unit_backward.register_fake
def _gated_unit_backward_shapes(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_gradients(bias_E2I, weights_R, need_bias)


@torch.library.custom_op(
    "cpt::gated_unit_backward_into", mutates_args=("d_gate_up_R2I", "weighted_RI")
)
def gated_unit_backward_into(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    d_gate_up_R2I: torch.Tensor,
    weighted_RI: torch.Tensor,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `gated_unit_backward` does, but write to other tensors, which are contiguous."""
    return _go_back(
        gate_up_R2I,
        d_hidden_RI,
        bias_E2I,
        weights_R,
        ends_E,
        alpha,
        limit,
        d_gate_up_R2I,
        weighted_RI,
        need_bias,
    )


@gated_unit_backward_into.register_fake
def _gated_unit_backward_into_shapes(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    d_gate_up_R2I: torch.Tensor,
    weighted_RI: torch.Tensor,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_gradients(bias_E2I, weights_R, need_bias)


def _go_back(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    d_gate_up_R2I: torch.Tensor,
    weighted_RI: torch.Tensor,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write `d_gate_up_R2I` and `weighted_RI`, which may be the inputs of their shapes."""
    products_R, d_bias_E2I = _new_gradients(bias_E2I, weights_R, need_bias)
    if fused_kernels_run_on(gate_up_R2I):
        from cpt.model.kernels import triton_gated_unit

        triton_gated_unit.backward(
            gate_up_R2I,
            d_hidden_RI,
            bias_E2I,
            weights_R,
            ends_E,
            alpha,
            limit,
            d_gate_up_R2I=d_gate_up_R2I,
            weighted_RI=weighted_RI,
            products_R=products_R,
            d_bias_E2I=d_bias_E2I if need_bias else None,
        )
        return products_R, d_bias_E2I
    experts_R = experts_of_rows(ends_E, gate_up_R2I.shape[0])
    for block in blocks(gate_up_R2I):
        gate_up = widen(gate_up_R2I[block]).add_(bias_E2I[experts_R[block]])
        weight_R1 = weights_R[block, None]
        d_hidden = widen(d_hidden_RI[block])
        scaled = d_hidden * weight_R1
        hidden = _backward(gate_up, scaled, d_gate_up_R2I[block], alpha, limit)
        products_R[block] = d_hidden.mul_(hidden).sum(1)
        weighted_RI[block] = hidden.mul_(weight_R1)
    if need_bias:
        d_bias_E2I.copy_(weighted_sums(d_gate_up_R2I, None, ends_E))
    return products_R, d_bias_E2I


def _new_hidden(gate_up_R2I: torch.Tensor) -> torch.Tensor:
    num_rows, columns = gate_up_R2I.shape
    return gate_up_R2I.new_empty(num_rows, columns // 2)


def _new_gradients(
    bias_E2I: torch.Tensor, weights_R: torch.Tensor, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    products_R = weights_R.new_empty(weights_R.shape, dtype=wide_dtype(weights_R.dtype))
    d_bias_E2I = bias_E2I.new_empty(bias_E2I.shape if need_bias else 0)
    return products_R, d_bias_E2I


def _forward(gate_up_R2I: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Return `hidden` of a block of rows that have their bias."""
    gate = gate_up_R2I[:, ::2].clamp(max=limit)
    up = gate_up_R2I[:, 1::2].clamp(-limit, limit)
    return (up + 1).mul_(gate).mul_(gate.mul_(alpha).sigmoid_())


def _backward(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    d_gate_up_R2I: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """Write the gradient of a block of rows that have their bias, and return their `hidden`."""
    gate_raw = gate_up_R2I[:, ::2]
    up_raw = gate_up_R2I[:, 1::2]
    gate = gate_raw.clamp(max=limit)
    up_plus_1 = up_raw.clamp(-limit, limit).add_(1)
    sigmoid = (gate * alpha).sigmoid_()
    glu = gate * sigmoid
    # d glu / d gate = sigmoid + alpha * gate * sigmoid * (1 - sigmoid)
    #                = sigmoid + alpha * glu * (1 - sigmoid)
    slope = (1 - sigmoid).mul_(glu).mul_(alpha).add_(sigmoid)
    d_gate = slope.mul_(up_plus_1).mul_(d_hidden_RI).mul_(gate_raw <= limit)
    d_gate_up_R2I[:, ::2] = d_gate
    d_gate_up_R2I[:, 1::2] = (d_hidden_RI * glu).mul_(up_raw.abs() <= limit)
    return glu.mul_(up_plus_1)
