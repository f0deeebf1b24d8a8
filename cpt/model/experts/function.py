"""The arithmetic of gpt-oss experts, forward and backward, as two autograd Functions.

    gate_up = rows @ gate_up_proj                                                    (_GateUp)
    gate, up = even, odd columns of gate_up + gate_up_proj_bias, clamped             (_GatedDown)
    hidden  = (up + 1) * gate * sigmoid(alpha * gate)
    out     = weight * (hidden @ down_proj + down_proj_bias)

Decisions
    - Kept for the backward are the rows, their weights and gate_up (without its bias), R * (M + 2I)
      values. The activations are computed again in passing (elementwise, under 4 % of the time).
      The outputs are not needed: with d_hidden = d_out @ down_proj^T, which is computed anyway, the
      gradient of a weight is <d_hidden, hidden> + <d_out, bias>.
    - Keeping only the rows would save R * 2I values more and cost one more product, 2 of 11 units
      of work. Activation checkpointing makes that trade for whole layers.
    - The weights of the experts are not saved either: under ZeRO-3 a saved tensor would hold the
      gathered storage until the backward. The Functions remember the parameter objects and read
      their values when the backward runs, after the engine has gathered them again for the module.
    - The gradient of gate_up is written over gate_up, and there are two Functions so that autograd
      can let go of d_out between them. At the peak of the backward only rows, d_gate_up, d_rows and
      the parameters' gradients are alive. torch refuses a second backward through the same graph,
      because a saved tensor has changed.
    - Elementwise work is done in fp32 on blocks of rows that fit a cache; only products round to
      the working dtype.
    - A parameter that needs no gradient costs none of its work.

Shape letters: R rows sorted by expert, M model size, I expert size, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cpt.model.experts.grouped import (
    Groups,
    inner,
    is_served,
    outer,
    product,
    weighted_sums,
    wide_dtype,
)

BLOCK_ROWS = {"cpu": 128, "cuda": 16_384}
"""Rows of one elementwise pass: within a core's cache, or enough to fill a GPU without a large fp32
copy.
"""


class Parameters(NamedTuple):
    """The tensors of the experts, in the order of `hf_layout.EXPERT_TENSORS`."""

    gate_up_EM2I: torch.Tensor
    gate_up_bias_E2I: torch.Tensor
    down_EIM: torch.Tensor
    down_bias_EM: torch.Tensor


class Activation(NamedTuple):
    """The gated unit of gpt-oss."""

    alpha: float
    """Steepness of the sigmoid."""
    limit: float
    """The value at which gate (from above) and up (on both sides) are clamped."""

    def forward(self, gate_up_R2I: torch.Tensor) -> torch.Tensor:
        """Return (R, I) from columns that are gate and up in turn."""
        gate = gate_up_R2I[:, ::2].clamp(max=self.limit)
        up = gate_up_R2I[:, 1::2].clamp(-self.limit, self.limit)
        return (up + 1).mul_(gate).mul_(gate.mul_(self.alpha).sigmoid_())

    def backward(
        self, gate_up_R2I: torch.Tensor, d_hidden_RI: torch.Tensor, d_gate_up_R2I: torch.Tensor
    ) -> torch.Tensor:
        """Write the gradient of `gate_up_R2I` and return the output of `forward`."""
        gate_raw = gate_up_R2I[:, ::2]
        up_raw = gate_up_R2I[:, 1::2]
        gate = gate_raw.clamp(max=self.limit)
        up_plus_1 = up_raw.clamp(-self.limit, self.limit).add_(1)
        sigmoid = (gate * self.alpha).sigmoid_()
        glu = gate * sigmoid
        # d glu / d gate = sigmoid + alpha * gate * sigmoid * (1 - sigmoid)
        #                = sigmoid + alpha * glu * (1 - sigmoid)
        slope = (1 - sigmoid).mul_(glu).mul_(self.alpha).add_(sigmoid)
        d_gate = slope.mul_(up_plus_1).mul_(d_hidden_RI).mul_(gate_raw <= self.limit)
        d_gate_up_R2I[:, ::2] = d_gate
        d_gate_up_R2I[:, 1::2] = (d_hidden_RI * glu).mul_(up_raw.abs() <= self.limit)
        return glu.mul_(up_plus_1)


class _GateUp(torch.autograd.Function):
    """The first product, (R, M) -> (R, 2I), without its bias."""

    @staticmethod
    def forward(
        ctx: Any, rows_RM: torch.Tensor, groups: Groups, grouped: bool, gate_up_EM2I: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RM)
        ctx.groups = groups
        ctx.grouped = grouped
        ctx.held = gate_up_EM2I  # not saved: see the module's docstring
        return product(rows_RM, gate_up_EM2I, groups, grouped=grouped)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows_RM,) = ctx.saved_tensors
        need_rows, _, _, need_gate_up = ctx.needs_input_grad
        d_gate_up = d_rows = None
        if need_gate_up:
            d_gate_up = outer(rows_RM, grads[0], ctx.groups, grouped=ctx.grouped)
        if need_rows:
            d_rows = product(grads[0], ctx.held.transpose(1, 2), ctx.groups, grouped=ctx.grouped)
        return d_rows, None, None, d_gate_up


class _GatedDown(torch.autograd.Function):
    """Bias, gated unit, second product and routing weight, (R, 2I) -> (R, M)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up_R2I: torch.Tensor,
        weights_R: torch.Tensor,
        groups: Groups,
        activation: Activation,
        grouped: bool,
        skip_output: bool,
        *biases_and_down: torch.Tensor,
    ) -> torch.Tensor:
        gate_up_bias_E2I, down_EIM, down_bias_EM = biases_and_down
        num_rows = gate_up_R2I.shape[0]
        _, expert_size, model_size = down_EIM.shape
        ctx.save_for_backward(gate_up_R2I, weights_R)
        ctx.groups = groups
        ctx.activation = activation
        ctx.grouped = grouped
        ctx.held = biases_and_down  # not saved: see the module's docstring
        if skip_output:
            return gate_up_R2I.new_zeros(num_rows, model_size)
        experts_R = groups.experts_of_rows(num_rows)
        hidden_RI = gate_up_R2I.new_empty(num_rows, expert_size)
        for block in _blocks(gate_up_R2I):
            gate_up = _wide(gate_up_R2I[block]).add_(gate_up_bias_E2I[experts_R[block]])
            hidden_RI[block] = activation.forward(gate_up)
        out_RM = product(hidden_RI, down_EIM, groups, grouped=grouped)
        del hidden_RI
        for block in _blocks(gate_up_R2I):
            biased = _wide(out_RM[block]).add_(down_bias_EM[experts_R[block]])
            out_RM[block] = biased.mul_(weights_R[block, None])
        return out_RM

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_out_RM = grads[0].contiguous()
        groups = ctx.groups
        gate_up_R2I, weights_R = ctx.saved_tensors
        gate_up_bias_E2I, _, down_bias_EM = ctx.held
        need_weights = ctx.needs_input_grad[1]
        need_gate_up_bias, need_down, need_down_bias = ctx.needs_input_grad[6:]
        weighted_RI, d_weights_R = _elementwise_backward(ctx, d_out_RM, weights_R, gate_up_R2I)
        d_gate_up_R2I = gate_up_R2I.detach()
        d_weights = d_gate_up_bias = d_down = d_down_bias = None
        if need_down:
            d_down = outer(weighted_RI, d_out_RM, groups, grouped=ctx.grouped)
        del weighted_RI
        if need_down_bias:
            sums_EM = weighted_sums(d_out_RM, weights_R, groups, grouped=ctx.grouped)
            d_down_bias = sums_EM.to(down_bias_EM.dtype)
        if need_weights:
            bias_part_R = inner(d_out_RM, down_bias_EM, groups, grouped=ctx.grouped)
            d_weights = d_weights_R.add_(bias_part_R).to(weights_R.dtype)
        if need_gate_up_bias:
            sums_E2I = weighted_sums(d_gate_up_R2I, None, groups, grouped=ctx.grouped)
            d_gate_up_bias = sums_E2I.to(gate_up_bias_E2I.dtype)
        return d_gate_up_R2I, d_weights, None, None, None, None, d_gate_up_bias, d_down, d_down_bias


def _elementwise_backward(
    ctx: Any, d_out_RM: torch.Tensor, weights_R: torch.Tensor, gate_up_R2I: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `hidden` times its row's weight, and <d_hidden, hidden> of every row in fp32.

    Gate_up is overwritten with its gradient.
    """
    gate_up_bias_E2I, down_EIM, _ = ctx.held
    groups = ctx.groups
    # This is the gradient for the unweighted output: the weights come in below, in fp32.
    d_hidden_RI = product(d_out_RM, down_EIM.transpose(1, 2), groups, grouped=ctx.grouped)
    experts_R = groups.experts_of_rows(d_out_RM.shape[0])
    d_weights_R = torch.empty_like(weights_R, dtype=wide_dtype(weights_R.dtype))
    for block in _blocks(d_out_RM):
        gate_up = _wide(gate_up_R2I[block]).add_(gate_up_bias_E2I[experts_R[block]])
        weight_R1 = weights_R[block, None]
        d_hidden = _wide(d_hidden_RI[block])
        scaled = d_hidden * weight_R1
        hidden = ctx.activation.backward(gate_up, scaled, gate_up_R2I[block])
        d_weights_R[block] = d_hidden.mul_(hidden).sum(1)
        d_hidden_RI[block] = hidden.mul_(weight_R1)  # the buffer's second life
    return d_hidden_RI, d_weights_R


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = BLOCK_ROWS[rows.device.type]
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]


def _wide(block: torch.Tensor) -> torch.Tensor:
    """Return a copy in fp32 at least."""
    return block.to(wide_dtype(block.dtype), copy=True)


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
    """Put each row through its expert and multiply by its weight.

    The result is differentiable in rows, weights and parameters.

    Args:
        rows_RM: Inputs sorted by expert.
        weights_R: Routing weight of each row.
        groups: The rows of each expert.
        parameters: The experts' tensors; leaves, read again when the backward runs.
        activation: The gated unit.
        grouped: Whether to use grouped products; by default, where they are right.
        skip_output: Whether to return zeros. That is enough for a recomputation, which runs for
            what the backward needs, not for the output.

    Returns:
        The outputs (R, M), in the order of the rows.
    """
    if grouped is None:
        expert_size = parameters.down_EIM.shape[1]
        grouped = is_served(rows_RM, rows_RM.shape[1], 2 * expert_size, expert_size)
    gate_up_EM2I, *others = parameters
    gate_up_R2I = _GateUp.apply(rows_RM, groups, grouped, gate_up_EM2I)
    return _GatedDown.apply(
        gate_up_R2I, weights_R, groups, activation, grouped, skip_output, *others
    )
