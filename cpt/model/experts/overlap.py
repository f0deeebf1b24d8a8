"""Experts in two halves: the rows of one half travel while the other half is computed.

    forward    start A out, start B out; for each half: wait, compute, start back; wait for both
    backward   the same with gradients; the gradients of the weights are computed while the
               last rows are still on their way back

Decisions
    - The halves are halves of each rank's experts, not of its tokens. An expert has all its rows in
      one product, and the rows of both halves lie behind each other in the order in which the
      undivided layer has them. So outputs and gradients are the same bit for bit.
    - Forward and backward are one autograd Function each way, which states the order of issue
      itself instead of relying on the order of autograd's nodes. It also keeps all reading of the
      weights in one call of the module that ZeRO-3 gathers them for. As in function.py, it
      remembers the parameters and saves none of their values.
    - The gradient of a weight is one product over the rows of both halves, as in the undivided
      layer: nothing is added up, padded or copied but the r values a row of an adapter. For this
      the operands of these products are buffers of all rows, and each half writes its part. That
      costs the backward 2.5 I values a row at its peak beyond function.py, which overwrites gate_up
      with its gradient.
    - An exchange is waited for by the device's stream, not by the host. Both of its buffers are
      referenced until then.

Shape letters: R rows of this rank's tokens, A arrived rows, M model size, I expert size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cpt.model import recomputation
from cpt.model.experts.adapter_products import NO_ADAPTERS, ExpertAdapters
from cpt.model.experts.dispatch import Exchange, Half, PlanInHalves
from cpt.model.experts.function import Activation, Parameters
from cpt.model.experts.grouped import Groups, is_served, outer, product
from cpt.model.experts.packed import Matrices
from cpt.model.kernels.expert_output import expert_output, expert_output_backward
from cpt.model.kernels.gated_unit import gated_unit, gated_unit_backward_into
from cpt.model.kernels.rows import gather_rows, gather_rows_into, pack_rows
from cpt.model.products.recipe import EightBit
from cpt.parallel.exchange import Transfer


@dataclass(frozen=True, slots=True)
class _OverlappedLayer:
    """What forward and backward need besides the values that autograd saves."""

    plan: PlanInHalves
    exchange: Exchange
    parameters: Parameters
    adapters: ExpertAdapters
    activation: Activation
    grouped: bool
    """Whether to use grouped products."""
    eight_bit: EightBit | None
    """How products with the experts' matrices are computed."""

    @property
    def model_size(self) -> int:
        """Columns of a row without the weight beside it."""
        return self.parameters.down_EIM.shape[2]

    def product(
        self, rows_AK: torch.Tensor, matrices_EKN: Matrices, groups: Groups
    ) -> torch.Tensor:
        """Return each row times the matrix of its expert, (A, N)."""
        return product(
            rows_AK, matrices_EKN, groups, grouped=self.grouped, eight_bit=self.eight_bit
        )

    def gate_up(self, rows_AM: torch.Tensor, half: Half) -> torch.Tensor:
        """Return the first product (A, 2I) of one half, without its bias."""
        groups = half.plan.groups
        matrices = self.parameters.gate_up_EM2I[half.experts]
        gate_up_A2I = self.product(rows_AM, matrices, groups)
        adapter = self.adapters.of_experts(half.experts).gate_up
        if adapter is not None:
            adapter.add_to(gate_up_A2I, rows_AM, groups, grouped=self.grouped)
        return gate_up_A2I

    def outputs(self, gate_up_A2I: torch.Tensor, rows_A: torch.Tensor, half: Half) -> torch.Tensor:
        """Return the outputs (A, M) of one half, times their weights."""
        groups = half.plan.groups
        ends_E = groups.ends_E
        _, gate_up_bias, down, down_bias = self.parameters
        hidden_AI = gated_unit(gate_up_A2I, gate_up_bias[half.experts], ends_E, *self.activation)
        out_AM = self.product(hidden_AI, down[half.experts], groups)
        adapter = self.adapters.of_experts(half.experts).down
        if adapter is not None:
            adapter.add_to(out_AM, hidden_AI, groups, grouped=self.grouped)
        expert_output(out_AM, down_bias[half.experts], rows_A[:, self.model_size], ends_E)
        return out_AM


class _Needed(NamedTuple):
    """Which gradients of the experts' tensors are needed, in the order of `Parameters`."""

    gate_up: bool
    gate_up_bias: bool
    down: bool
    down_bias: bool


class _Gradients:
    """The operands of the weights' gradients, of which each half writes its rows."""

    def __init__(
        self, layer: _OverlappedLayer, needs: tuple[bool, ...], arrived: torch.Tensor
    ) -> None:
        num_rows = arrived.shape[0]
        expert_size, model_size = layer.parameters.down_EIM.shape[1:]
        self._layer = layer
        self._needs = _Needed(*needs[:4])
        self._need_adapters = any(needs[4:])
        self._arrived = arrived
        self.d_out_AM = arrived.new_empty(num_rows, model_size)
        self._d_gate_up_A2I = arrived.new_empty(num_rows, 2 * expert_size)
        self._weighted_AI = arrived.new_empty(num_rows, expert_size)
        self._bias_parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._inner_gate_up: list[torch.Tensor] = []
        self._inner_down: list[torch.Tensor] = []

    def go_back(self, gate_up_A2I: torch.Tensor, half: Half, *, need_rows: bool) -> torch.Tensor:
        """Return the gradient of one half's rows with their weights beside them, by origin.

        Without `need_rows` only the weights' operands are computed, and an empty tensor returns.
        """
        layer = self._layer
        plan = half.plan
        parameters = layer.parameters.of_experts(half.experts)
        rows = self._arrived[half.arrived]
        weights_A = rows[:, layer.model_size]
        d_out_AM = self.d_out_AM[half.arrived]
        d_gate_up_A2I = self._d_gate_up_A2I[half.arrived]
        products_A, d_gate_up_bias = gated_unit_backward_into(
            gate_up_A2I,
            self._d_hidden(d_out_AM, half),
            parameters.gate_up_bias_E2I,
            weights_A,
            plan.groups.ends_E,
            *layer.activation,
            d_gate_up_A2I,
            self._weighted_AI[half.arrived],
            self._needs.gate_up_bias,
        )
        d_weights_A, d_down_bias = expert_output_backward(
            d_out_AM,
            products_A,
            parameters.down_bias_EM,
            weights_A,
            plan.groups.ends_E,
            need_rows,
            self._needs.down_bias,
        )
        self._bias_parts.append((d_gate_up_bias, d_down_bias))
        d_rows_AM = self._d_rows(d_gate_up_A2I, half, need_rows=need_rows)
        if d_rows_AM is None:
            return rows.new_empty(0)
        columns = rows.shape[1] - layer.model_size
        return pack_rows(d_rows_AM, d_weights_A[:, None], plan.by_origin_A, columns)

    def _d_hidden(self, d_out_AM: torch.Tensor, half: Half) -> torch.Tensor:
        """Return the gradient of hidden, (A, I)."""
        layer = self._layer
        groups = half.plan.groups
        down_EMI = layer.parameters.down_EIM[half.experts].transpose(1, 2)
        d_hidden_AI = layer.product(d_out_AM, down_EMI, groups)
        adapter = layer.adapters.of_experts(half.experts).down
        if adapter is not None:
            d_inner = adapter.inner_gradient(d_out_AM, groups, grouped=layer.grouped)
            adapter.add_gradient_of_rows(d_hidden_AI, d_inner, groups, grouped=layer.grouped)
            self._inner_down.append(d_inner)
        return d_hidden_AI

    def _d_rows(
        self, d_gate_up_A2I: torch.Tensor, half: Half, *, need_rows: bool
    ) -> torch.Tensor | None:
        """Return the gradient of the rows, (A, M); None if it is not needed."""
        layer = self._layer
        groups = half.plan.groups
        adapter = layer.adapters.of_experts(half.experts).gate_up
        if adapter is not None:
            d_inner = adapter.inner_gradient(d_gate_up_A2I, groups, grouped=layer.grouped)
            self._inner_gate_up.append(d_inner)
        if not need_rows:
            return None
        gate_up_E2IM = layer.parameters.gate_up_EM2I[half.experts].transpose(1, 2)
        d_rows_AM = layer.product(d_gate_up_A2I, gate_up_E2IM, groups)
        if adapter is not None:
            adapter.add_gradient_of_rows(
                d_rows_AM, self._inner_gate_up[-1], groups, grouped=layer.grouped
            )
        return d_rows_AM

    def of_parameters(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the parameters, in their order, where they are needed."""
        layer = self._layer
        groups = layer.plan.groups
        rows_AM = self._arrived[:, : layer.model_size]
        d_gate_up = d_gate_up_bias = d_down = d_down_bias = None
        if self._needs.down:
            d_down = outer(self._weighted_AI, self.d_out_AM, groups, grouped=layer.grouped)
        if self._needs.gate_up:
            d_gate_up = outer(rows_AM, self._d_gate_up_A2I, groups, grouped=layer.grouped)
        gate_up_parts, down_parts = zip(*self._bias_parts, strict=True)
        if self._needs.gate_up_bias:
            d_gate_up_bias = torch.cat(gate_up_parts)
        if self._needs.down_bias:
            d_down_bias = torch.cat(down_parts)
        return d_gate_up, d_gate_up_bias, d_down, d_down_bias, *self._of_adapters(rows_AM)

    def _of_adapters(self, rows_AM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of A and B of the first product and of the second."""
        layer = self._layer
        found: list[torch.Tensor | None] = []
        for adapter, rows, inner_parts, d_out in (
            (layer.adapters.gate_up, rows_AM, self._inner_gate_up, self._d_gate_up_A2I),
            (layer.adapters.down, self._weighted_AI, self._inner_down, self.d_out_AM),
        ):
            if adapter is None or not self._need_adapters:
                found += [None, None]
                continue
            d_inner = torch.cat(inner_parts)
            found += adapter.gradients(
                rows, d_inner, d_out, layer.plan.groups, grouped=layer.grouped
            )
        return tuple(found)


class _InHalves(torch.autograd.Function):
    """Rows and weights of this rank's tokens, packed -> results on the same rank, (R, M)."""

    @staticmethod
    def forward(
        ctx: Any,
        payload: torch.Tensor,
        layer: _OverlappedLayer,
        arrived: torch.Tensor,
        is_filled: bool,
        *_parameters_and_adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        halves = layer.plan.halves
        second = recomputation.is_second_run()
        ways_out: list[Transfer] = []
        if not is_filled:
            for half in halves:
                ways_out.append(layer.exchange.start_out(payload, half))
        done_RM = payload.new_empty(0 if second else payload.shape[0], layer.model_size)
        ways_back = []
        gate_ups = []
        for half in halves:
            rows = arrived[half.arrived]
            if ways_out:
                gather_rows_into(ways_out.pop(0).wait(), half.plan.by_expert_A, rows)
            gate_up_A2I = layer.gate_up(rows[:, : layer.model_size], half)
            gate_ups.append(gate_up_A2I)
            if not second:
                out_AM = layer.outputs(gate_up_A2I, rows, half)
                arranged = gather_rows(out_AM, half.plan.by_origin_A)
                ways_back.append(layer.exchange.start_back(arranged, half, done_RM))
        ctx.layer = layer
        ctx.save_for_backward(arrived, *gate_ups)
        for way in ways_back:
            way.wait()
        if second:
            return recomputation.unread(payload, payload.shape[0], layer.model_size)
        return done_RM

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_done_RM = grads[0].contiguous()
        layer: _OverlappedLayer = ctx.layer
        halves = layer.plan.halves
        arrived, *gate_ups = ctx.saved_tensors
        need_rows = ctx.needs_input_grad[0]
        gradients = _Gradients(layer, ctx.needs_input_grad[4:], arrived)
        ways_out = []
        for half in halves:
            ways_out.append(layer.exchange.start_out(d_done_RM, half))
        d_payload = None
        if need_rows:
            d_payload = d_done_RM.new_empty(d_done_RM.shape[0], arrived.shape[1])
        ways_back = []
        for half, gate_up_A2I in zip(halves, gate_ups, strict=True):
            d_out_AM = gradients.d_out_AM[half.arrived]
            gather_rows_into(ways_out.pop(0).wait(), half.plan.by_expert_A, d_out_AM)
            arranged = gradients.go_back(gate_up_A2I, half, need_rows=need_rows)
            if d_payload is not None:
                ways_back.append(layer.exchange.start_back(arranged, half, d_payload))
        of_parameters = gradients.of_parameters()
        for way in ways_back:
            way.wait()
        return d_payload, None, None, None, *of_parameters


def apply_in_halves(
    payload: torch.Tensor,
    counts_E: torch.Tensor,
    exchange: Exchange,
    parameters: Parameters,
    activation: Activation,
    adapters: ExpertAdapters = NO_ADAPTERS,
    eight_bit: EightBit | None = None,
) -> tuple[torch.Tensor, int]:
    """Send rows to their experts, compute, and send the results back, in two halves.

    A recomputation does no more than the backward needs, as in `Exchange`.

    Args:
        payload: Rows and weights from `Assignment.pack`, sorted by `label_by_half`.
        counts_E: Rows of each expert, in the same order.
        exchange: The exchanges of the layer.
        parameters: The local experts' tensors; leaves, read again when the backward runs.
        activation: The gated unit.
        adapters: What is added to the two products; leaves, too.
        eight_bit: How products with the experts' matrices are computed.

    Returns:
        The results (R, M) in the order of the payload, and the number of rows computed here.
    """
    running = recomputation.current()
    keeps = running is not None and running.keep
    takes = running is not None and keeps and running.is_second
    if running is not None and takes:
        plan, arrived = running.take()
    else:
        plan = exchange.plan_in_halves(counts_E)
        arrived = payload.new_empty(plan.num_arrived, payload.shape[1])
        if running is not None and keeps:
            # The Function fills it.
            running.put((plan, arrived))
    expert_size, model_size = parameters.down_EIM.shape[1:]
    layer = _OverlappedLayer(
        plan=plan,
        exchange=exchange,
        parameters=parameters,
        adapters=adapters,
        activation=activation,
        grouped=is_served(arrived, model_size, 2 * expert_size, expert_size, *adapters.ranks()),
        eight_bit=eight_bit,
    )
    done_RM = _InHalves.apply(payload, layer, arrived, takes, *parameters, *adapters.tensors())
    return done_RM, plan.num_arrived
