"""The arithmetic of gpt-oss experts, forward and backward, as one autograd Function.

    gate_up = rows @ gate_up_proj;  gate, up = even, odd columns of gate_up + gate_up_proj_bias, clamped
    hidden  = (up + 1) * gate * sigmoid(alpha * gate)
    out     = weight * (hidden @ down_proj + down_proj_bias)

Decisions
    Kept for the backward: the rows, their weights and gate_up (without its bias), R * (M + 2I) values.  Not kept are
    the activations, computed again in passing (elementwise, under 4 % of the time), and the outputs: with d_hidden =
    d_out @ down_proj^T, which is needed anyway, the gradient of a weight is <d_hidden, hidden> + <d_out, bias>.
    Keeping only the rows would save R * 2I values more and cost one more product, 2 of 11 units of work: activation
    checkpointing makes that trade for whole layers.
    The weights of the experts are not kept either: under ZeRO-3 a saved tensor would hold the gathered storage until
    the backward.  The Function remembers the parameter objects and reads what they hold when the backward runs, which
    is after the engine has gathered them again for the module.
    Elementwise work is done in fp32 on blocks of rows that fit a cache; only products round to the working dtype.
    A parameter that needs no gradient costs none of its work.

Shape letters: R rows sorted by expert, M model size, I expert size, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cpt.model.grouped import Groups, inner, is_served, outer, product, weighted_sums

BLOCK_ROWS = {"cpu": 128, "cuda": 16_384}
"""Rows of one elementwise pass: within a core's cache, or enough to fill a GPU without a large fp32 copy."""


class Parameters(NamedTuple):
    """The tensors of the experts, in the order of `hf_layout.EXPERT_TENSORS`."""

    gate_up_EM2I: torch.Tensor
    gate_up_bias_E2I: torch.Tensor
    down_EIM: torch.Tensor
    down_bias_EM: torch.Tensor


class Activation(NamedTuple):
    """gpt-oss's gated unit."""

    alpha: float
    """Steepness of the sigmoid."""
    limit: float
    """Where gate (above) and up (on both sides) are clamped."""

    def forward(self, gate_up_R2I: torch.Tensor) -> torch.Tensor:
        """(R, I) from columns in turn gate and up."""
        gate = gate_up_R2I[:, ::2].clamp(max=self.limit)
        up = gate_up_R2I[:, 1::2].clamp(-self.limit, self.limit)
        return (up + 1).mul_(gate).mul_(gate.mul_(self.alpha).sigmoid_())

    def backward(
        self, gate_up_R2I: torch.Tensor, d_hidden_RI: torch.Tensor, d_gate_up_R2I: torch.Tensor
    ) -> torch.Tensor:
        """Write the gradient of `gate_up_R2I` and return what `forward` does."""
        gate_raw, up_raw = gate_up_R2I[:, ::2], gate_up_R2I[:, 1::2]
        gate = gate_raw.clamp(max=self.limit)
        up_plus_1 = up_raw.clamp(-self.limit, self.limit).add_(1)
        sigmoid = (gate * self.alpha).sigmoid_()
        glu = gate * sigmoid
        # d glu / d gate = sigmoid + alpha * gate * sigmoid * (1 - sigmoid) = sigmoid + alpha * glu * (1 - sigmoid)
        slope = (1 - sigmoid).mul_(glu).mul_(self.alpha).add_(sigmoid)
        d_gate = slope.mul_(up_plus_1).mul_(d_hidden_RI).mul_(gate_raw <= self.limit)
        d_gate_up_R2I[:, ::2] = d_gate
        d_gate_up_R2I[:, 1::2] = (d_hidden_RI * glu).mul_(up_raw.abs() <= self.limit)
        return glu.mul_(up_plus_1)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RM: torch.Tensor,
        weights_R: torch.Tensor,
        groups: Groups,
        activation: Activation,
        grouped: bool,
        skip_output: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        held = Parameters(*parameters)
        gate_up_R2I = product(rows_RM, held.gate_up_EM2I, groups, grouped=grouped)
        ctx.save_for_backward(rows_RM, weights_R, gate_up_R2I)
        ctx.groups, ctx.activation, ctx.grouped = groups, activation, grouped
        ctx.held = held  # not saved: see the module's docstring
        if skip_output:
            return torch.zeros_like(rows_RM)
        experts_R = groups.experts_of_rows(rows_RM.shape[0])
        hidden_RI = gate_up_R2I.new_empty(rows_RM.shape[0], held.down_EIM.shape[1])
        for block in _blocks(rows_RM):
            gate_up = _wide(gate_up_R2I[block]).add_(held.gate_up_bias_E2I[experts_R[block]])
            hidden_RI[block] = activation.forward(gate_up)
        out_RM = product(hidden_RI, held.down_EIM, groups, grouped=grouped)
        del hidden_RI
        for block in _blocks(rows_RM):
            biased = _wide(out_RM[block]).add_(held.down_bias_EM[experts_R[block]])
            out_RM[block] = biased.mul_(weights_R[block, None])
        return out_RM

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_out_RM, held, groups = grads[0].contiguous(), ctx.held, ctx.groups
        rows_RM, weights_R, gate_up_R2I = ctx.saved_tensors
        need_rows, need_weights = ctx.needs_input_grad[:2]
        need_gate_up, need_gate_up_bias, need_down, need_down_bias = ctx.needs_input_grad[6:]
        d_gate_up_R2I, weighted_RI, d_weights_R = _elementwise_backward(ctx, d_out_RM, weights_R, gate_up_R2I)
        d_rows = d_weights = d_gate_up = d_gate_up_bias = d_down = d_down_bias = None
        if need_down:
            d_down = outer(weighted_RI, d_out_RM, groups, grouped=ctx.grouped)
        del weighted_RI
        if need_down_bias:
            d_down_bias = weighted_sums(d_out_RM, weights_R, groups, grouped=ctx.grouped)
        if need_weights:
            bias_part_R = inner(d_out_RM, held.down_bias_EM, groups, grouped=ctx.grouped)
            d_weights = d_weights_R.add_(bias_part_R).to(weights_R.dtype)
        if need_gate_up_bias:
            d_gate_up_bias = weighted_sums(d_gate_up_R2I, None, groups, grouped=ctx.grouped)
        if need_gate_up:
            d_gate_up = outer(rows_RM, d_gate_up_R2I, groups, grouped=ctx.grouped)
        if need_rows:
            d_rows = product(d_gate_up_R2I, held.gate_up_EM2I.transpose(1, 2), groups, grouped=ctx.grouped)
        return d_rows, d_weights, None, None, None, None, d_gate_up, d_gate_up_bias, d_down, d_down_bias


def _elementwise_backward(
    ctx: Any, d_out_RM: torch.Tensor, weights_R: torch.Tensor, gate_up_R2I: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of gate_up, `hidden` times its row's weight, and <d_hidden, hidden> of every row in fp32."""
    held, groups = ctx.held, ctx.groups
    # of the unweighted output: the weights come in below, in fp32
    d_hidden_RI = product(d_out_RM, held.down_EIM.transpose(1, 2), groups, grouped=ctx.grouped)
    experts_R = groups.experts_of_rows(d_out_RM.shape[0])
    d_gate_up_R2I = torch.empty_like(gate_up_R2I)
    d_weights_R = torch.empty_like(weights_R, dtype=_wide_dtype(weights_R.dtype))
    for block in _blocks(d_out_RM):
        gate_up = _wide(gate_up_R2I[block]).add_(held.gate_up_bias_E2I[experts_R[block]])
        weight, d_hidden = weights_R[block, None], _wide(d_hidden_RI[block])
        scaled = d_hidden * weight
        hidden = ctx.activation.backward(gate_up, scaled, d_gate_up_R2I[block])
        d_weights_R[block] = d_hidden.mul_(hidden).sum(1)
        d_hidden_RI[block] = hidden.mul_(weight)  # the buffer's second life
    return d_gate_up_R2I, d_hidden_RI, d_weights_R


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = BLOCK_ROWS[rows.device.type]
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(block: torch.Tensor) -> torch.Tensor:
    """A copy in at least fp32."""
    return block.to(_wide_dtype(block.dtype), copy=True)


def apply_experts(
    rows_RM: torch.Tensor,
    weights_R: torch.Tensor,
    groups: Groups,
    parameters: Parameters,
    activation: Activation,
    *,
    grouped: bool | None = None,
    skip_output: bool = False,
) -> torch.Tensor:
    """Each row through its expert, times its weight; differentiable in rows, weights and parameters.

    Args:
        rows_RM: Inputs sorted by expert.
        weights_R: Routing weight of each row.
        groups: Which rows are whose.
        parameters: The experts' tensors; leaves, read again when the backward runs.
        activation: The gated unit.
        grouped: Whether to use grouped products; default: where they are right.
        skip_output: Give zeros: enough for a recomputation, which is after what the backward needs and not the output.

    Returns:
        (R, M) in the same order.
    """
    if grouped is None:
        expert_size = parameters.down_EIM.shape[1]
        grouped = is_served(rows_RM, rows_RM.shape[1], 2 * expert_size, expert_size)
    return _Experts.apply(rows_RM, weights_R, groups, activation, grouped, skip_output, *parameters)
