"""The arithmetic of gpt-oss experts, forward and backward, as two autograd Functions.

    gate_up = rows @ gate_up_proj                                                    (_GateUp)
    gate, up = even, odd columns of gate_up + gate_up_proj_bias, clamped             (_GatedDown)
    hidden  = (up + 1) * gate * sigmoid(alpha * gate)
    out     = weight * (hidden @ down_proj + down_proj_bias)

With adapters each product has a second term, which adapter_products.py computes.

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
    - The elementwise steps between products are operators (cpt/model/kernels) that compute in fp32
      and round once.
    - A parameter that needs no gradient costs none of its work.

Shape letters: R rows sorted by expert, M model size, I expert size, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cpt.model import recomputation
from cpt.model.experts.adapter_products import NO_ADAPTERS, ExpertAdapter, ExpertAdapters
from cpt.model.experts.grouped import Groups, is_served, outer, product
from cpt.model.experts.packed import Matrices
from cpt.model.kernels.expert_output import expert_output, expert_output_backward
from cpt.model.kernels.gated_unit import gated_unit, gated_unit_backward
from cpt.model.products.recipe import EightBit


class Parameters(NamedTuple):
    """The tensors of the experts, in the order of `hf_layout.EXPERT_TENSORS`.

    Packed matrices are frozen: there is no gradient for them.
    """

    gate_up_EM2I: Matrices
    gate_up_bias_E2I: torch.Tensor
    down_EIM: Matrices
    down_bias_EM: torch.Tensor

    def of_experts(self, experts: slice) -> Parameters:
        """Return views of some of the experts."""
        return Parameters(
            self.gate_up_EM2I[experts],
            self.gate_up_bias_E2I[experts],
            self.down_EIM[experts],
            self.down_bias_EM[experts],
        )


class Activation(NamedTuple):
    """The gated unit of gpt-oss."""

    alpha: float
    """Steepness of the sigmoid."""
    limit: float
    """The value at which gate (from above) and up (on both sides) are clamped."""


class _GateUp(torch.autograd.Function):
    """The first product, (R, M) -> (R, 2I), without its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RM: torch.Tensor,
        groups: Groups,
        grouped: bool,
        adapter: ExpertAdapter | None,
        eight_bit: EightBit | None,
        gate_up_EM2I: Matrices,
        *_a_and_b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RM)
        ctx.groups = groups
        ctx.grouped = grouped
        ctx.adapter = adapter
        ctx.eight_bit = eight_bit
        ctx.held = gate_up_EM2I  # not saved: see the module's docstring
        gate_up_R2I = product(rows_RM, gate_up_EM2I, groups, grouped=grouped, eight_bit=eight_bit)
        if adapter is not None:
            adapter.add_to(gate_up_R2I, rows_RM, groups, grouped=grouped)
        return gate_up_R2I

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows_RM,) = ctx.saved_tensors
        groups = ctx.groups
        grouped = ctx.grouped
        adapter: ExpertAdapter | None = ctx.adapter
        need_rows = ctx.needs_input_grad[0]
        need_gate_up, need_a, need_b = ctx.needs_input_grad[5:]
        d_gate_up = d_rows = d_inner = d_a = d_b = None
        if need_gate_up:
            d_gate_up = outer(rows_RM, grads[0], groups, grouped=grouped)
        if adapter is not None:
            d_inner = adapter.inner_gradient(grads[0], groups, grouped=grouped)
            if need_a or need_b:
                d_a, d_b = adapter.gradients(rows_RM, d_inner, grads[0], groups, grouped=grouped)
        if need_rows:
            gate_up_E2IM = ctx.held.transpose(1, 2)
            d_rows = product(
                grads[0], gate_up_E2IM, groups, grouped=grouped, eight_bit=ctx.eight_bit
            )
            if adapter is not None and d_inner is not None:
                adapter.add_gradient_of_rows(d_rows, d_inner, groups, grouped=grouped)
        return d_rows, None, None, None, None, d_gate_up, d_a, d_b


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
        adapter: ExpertAdapter | None,
        eight_bit: EightBit | None,
        gate_up_bias_E2I: torch.Tensor,
        down_EIM: Matrices,
        down_bias_EM: torch.Tensor,
        *_a_and_b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up_R2I, weights_R)
        ctx.groups = groups
        ctx.activation = activation
        ctx.grouped = grouped
        ctx.adapter = adapter
        ctx.eight_bit = eight_bit
        # not saved: see the module's docstring
        ctx.held = gate_up_bias_E2I, down_EIM, down_bias_EM
        if skip_output:
            return recomputation.unread(gate_up_R2I, gate_up_R2I.shape[0], down_EIM.shape[2])
        ends_E = groups.ends_E
        hidden_RI = gated_unit(gate_up_R2I, gate_up_bias_E2I, ends_E, *activation)
        out_RM = product(hidden_RI, down_EIM, groups, grouped=grouped, eight_bit=eight_bit)
        if adapter is not None:
            adapter.add_to(out_RM, hidden_RI, groups, grouped=grouped)
        del hidden_RI
        expert_output(out_RM, down_bias_EM, weights_R, ends_E)
        return out_RM

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_out_RM = grads[0].contiguous()
        groups = ctx.groups
        gate_up_R2I, weights_R = ctx.saved_tensors
        gate_up_bias_E2I, down_EIM, _ = ctx.held
        adapter: ExpertAdapter | None = ctx.adapter
        need_gate_up_bias, need_down, _, need_a, need_b = ctx.needs_input_grad[8:]
        # This is the gradient for the unweighted output: the weights come in below, in fp32.
        d_hidden_RI = product(
            d_out_RM,
            down_EIM.transpose(1, 2),
            groups,
            grouped=ctx.grouped,
            eight_bit=ctx.eight_bit,
        )
        d_inner = None
        if adapter is not None:
            d_inner = adapter.inner_gradient(d_out_RM, groups, grouped=ctx.grouped)
            adapter.add_gradient_of_rows(d_hidden_RI, d_inner, groups, grouped=ctx.grouped)
        d_gate_up_R2I = gate_up_R2I.detach()
        products_R, d_gate_up_bias = gated_unit_backward(
            d_gate_up_R2I,
            d_hidden_RI,
            gate_up_bias_E2I,
            weights_R,
            groups.ends_E,
            *ctx.activation,
            need_gate_up_bias,
        )
        weighted_RI = d_hidden_RI  # the buffer's second life
        del d_hidden_RI
        d_down = d_a = d_b = None
        if need_down:
            d_down = outer(weighted_RI, d_out_RM, groups, grouped=ctx.grouped)
        if adapter is not None and d_inner is not None and (need_a or need_b):
            # The weight of a row is in `weighted`, so it is in neither of the other factors.
            d_a, d_b = adapter.gradients(
                weighted_RI, d_inner, d_out_RM, groups, grouped=ctx.grouped
            )
        del weighted_RI
        d_weights, d_down_bias = _gradients_of_output(ctx, d_out_RM, weights_R, products_R)
        if not need_gate_up_bias:
            d_gate_up_bias = None
        settings = (None,) * 6
        of_parameters = (d_gate_up_bias, d_down, d_down_bias, d_a, d_b)
        return d_gate_up_R2I, d_weights, *settings, *of_parameters


def _gradients_of_output(
    ctx: Any, d_out_RM: torch.Tensor, weights_R: torch.Tensor, products_R: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of the routing weights and of the second bias, as far as needed."""
    down_bias_EM = ctx.held[2]
    need_weights = ctx.needs_input_grad[1]
    need_bias = ctx.needs_input_grad[10]
    if not (need_weights or need_bias):
        return None, None
    d_weights_R, d_bias_EM = expert_output_backward(
        d_out_RM,
        products_R,
        down_bias_EM,
        weights_R,
        ctx.groups.ends_E,
        need_weights,
        need_bias,
    )
    return d_weights_R if need_weights else None, d_bias_EM if need_bias else None


def apply_experts(
    rows_RM: torch.Tensor,
    weights_R: torch.Tensor,
    groups: Groups,
    parameters: Parameters,
    activation: Activation,
    *,
    adapters: ExpertAdapters = NO_ADAPTERS,
    eight_bit: EightBit | None = None,
    grouped: bool | None = None,
    skip_output: bool = False,
) -> torch.Tensor:
    """Put each row through its expert and multiply by its weight.

    The result is differentiable in rows, weights, parameters and adapters.

    Args:
        rows_RM: Inputs sorted by expert.
        weights_R: Routing weight of each row.
        groups: The rows of each expert.
        parameters: The experts' tensors; leaves, read again when the backward runs.
        activation: The gated unit.
        adapters: What is added to the two products; leaves, too.
        eight_bit: How products with the experts' matrices are computed; by default in the working
            precision, as all others are.
        grouped: Whether to use grouped products; by default, where they are right.
        skip_output: Whether to return zeros. That is enough for a recomputation, which runs for
            what the backward needs, not for the output.

    Returns:
        The outputs (R, M), in the order of the rows.
    """
    if grouped is None:
        expert_size = parameters.down_EIM.shape[1]
        sizes = (rows_RM.shape[1], 2 * expert_size, expert_size, *adapters.ranks())
        grouped = is_served(rows_RM, *sizes)
    gate_up_EM2I, *others = parameters
    a_of_gate_up, b_of_gate_up, *a_and_b_of_down = adapters.tensors()
    gate_up_R2I = _GateUp.apply(
        rows_RM,
        groups,
        grouped,
        adapters.gate_up,
        eight_bit,
        gate_up_EM2I,
        a_of_gate_up,
        b_of_gate_up,
    )
    return _GatedDown.apply(
        gate_up_R2I,
        weights_R,
        groups,
        activation,
        grouped,
        skip_output,
        adapters.down,
        eight_bit,
        *others,
        *a_and_b_of_down,
    )
