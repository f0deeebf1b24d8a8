"""The kernels of the gated unit against its eager body in float64.

Outputs are fp32, because the interpreter truncates what it stores as bf16; operators in bf16 are
compared on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.kernels.gated_unit import (
    gated_unit,
    gated_unit_backward,
    gated_unit_backward_into,
)
from tests.support.expert_inputs import (
    BF16_TOLERANCE,
    TOLERANCE,
    KernelInputs,
    Normal,
    Shape,
    assert_close,
    ends_of,
    every_dtype,
)

ALPHA = 1.702
LIMIT = 7.0
SHAPES = {
    "several tiles": ((5, 0, 16, 33), 40),
    "columns in blocks": ((17, 2), 150),
    "one row": ((0, 1, 0), 3),
    "one expert": ((20,), 64),
    "more tiles than are added at a time": ((1, 520), 8),
    "no rows": ((0, 0, 0), 16),
}
"""Rows of each expert, expert size."""

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True)
class Inputs(KernelInputs):
    gate_up: torch.Tensor
    d_hidden: torch.Tensor


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Values reach both clamps; weights are a column of a matrix, as after an exchange."""
    counts, size = shape
    rows = sum(counts)
    normal = Normal(dtype, device).draw
    return Inputs(
        gate_up=normal(rows, 2 * size) * 5,
        d_hidden=normal(rows, size),
        bias=normal(len(counts), 2 * size),
        weights=normal(rows, 3)[:, 1],
        ends=ends_of(counts, device),
    )


def run_forward(inputs: Inputs) -> torch.Tensor:
    from cpt.model.kernels import triton_gated_unit

    hidden = torch.empty_like(inputs.d_hidden, dtype=torch.float32)
    triton_gated_unit.forward(inputs.gate_up, inputs.bias, inputs.ends, ALPHA, LIMIT, hidden)
    return hidden


def run_backward(inputs: Inputs) -> dict[str, torch.Tensor]:
    from cpt.model.kernels import triton_gated_unit

    wide = torch.float32
    found = {
        "d_gate_up": torch.empty_like(inputs.gate_up, dtype=wide),
        "weighted": torch.empty_like(inputs.d_hidden, dtype=wide),
        "products": inputs.weights.new_empty(inputs.weights.shape, dtype=wide),
        "d_bias": torch.empty_like(inputs.bias, dtype=wide),
    }
    triton_gated_unit.backward(
        inputs.gate_up,
        inputs.d_hidden,
        inputs.bias,
        inputs.weights,
        inputs.ends,
        ALPHA,
        LIMIT,
        d_gate_up_R2I=found["d_gate_up"],
        weighted_RI=found["weighted"],
        products_R=found["products"],
        d_bias_E2I=found["d_bias"],
    )
    return found


def operator_backward(inputs: Inputs) -> dict[str, torch.Tensor]:
    d_gate_up = inputs.gate_up.clone()
    weighted = inputs.d_hidden.clone()
    products, d_bias = gated_unit_backward(
        d_gate_up, weighted, inputs.bias, inputs.weights, inputs.ends, ALPHA, LIMIT, True
    )
    return {"d_gate_up": d_gate_up, "weighted": weighted, "products": products, "d_bias": d_bias}


@every_shape
@every_dtype
def test_forward_is_that_of_float64(
    shape: Shape, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    inputs = draw(shape, dtype, kernel_device)
    exact = inputs.in_float64()
    expected = gated_unit(exact.gate_up, exact.bias, exact.ends, ALPHA, LIMIT)
    assert_close(run_forward(inputs), expected, TOLERANCE)


@every_shape
@every_dtype
def test_every_gradient_is_that_of_float64(
    shape: Shape, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    inputs = draw(shape, dtype, kernel_device)
    found = run_backward(inputs)
    for name, expected in operator_backward(inputs.in_float64()).items():
        assert_close(found[name], expected, TOLERANCE)


def test_gradients_are_those_of_autograd(kernel_device: torch.device) -> None:
    """The eager body writes its gradients by hand, too."""
    inputs = draw(SHAPES["several tiles"], torch.float32, kernel_device)
    found = run_backward(inputs)
    exact = inputs.in_float64()
    gate_up = exact.gate_up.requires_grad_()
    bias = exact.bias.requires_grad_()
    counts = torch.tensor(SHAPES["several tiles"][0])
    biased = gate_up + bias.repeat_interleave(counts, 0)
    gate = biased[:, ::2].clamp(max=LIMIT)
    up = biased[:, 1::2].clamp(-LIMIT, LIMIT)
    hidden = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    weighted = hidden * exact.weights[:, None]
    (weighted * exact.d_hidden).sum().backward()
    assert gate_up.grad is not None and bias.grad is not None
    assert_close(found["d_gate_up"], gate_up.grad, TOLERANCE)
    assert_close(found["d_bias"], bias.grad, TOLERANCE)
    assert_close(found["weighted"], weighted.detach(), TOLERANCE)
    assert_close(found["products"], (hidden * exact.d_hidden).sum(1).detach(), TOLERANCE)


@pytest.mark.parametrize("value", [LIMIT, -LIMIT, 1e4, -1e4, 3e38, -3e38, float("nan")])
def test_extreme_values_do_what_they_do_eagerly(value: float, kernel_device: torch.device) -> None:
    """At the limit the gradient passes; NaN is not clamped away."""
    inputs = draw(((2, 1), 4), torch.float32, kernel_device)
    inputs.bias.zero_()
    inputs.gate_up[1, 3:7] = value
    exact = Inputs(**{n: getattr(inputs, n).cpu() for n in Inputs.__dataclass_fields__})
    forward = gated_unit(exact.gate_up, exact.bias, exact.ends, ALPHA, LIMIT)
    torch.testing.assert_close(run_forward(inputs).cpu(), forward, equal_nan=True)
    found = run_backward(inputs)
    for name, expected in operator_backward(exact).items():
        torch.testing.assert_close(found[name].cpu(), expected, equal_nan=True)


def test_two_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(((40, 0, 3), 70), torch.bfloat16, kernel_device)
    first = run_backward(inputs)
    for name, second in run_backward(inputs).items():
        assert torch.equal(first[name], second)


def test_nothing_is_written_beyond_the_rows(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_gated_unit

    inputs = draw(((3, 18), 5), torch.float32, kernel_device)
    room = torch.full((40, 5), 3.0, device=kernel_device)
    triton_gated_unit.forward(inputs.gate_up, inputs.bias, inputs.ends, ALPHA, LIMIT, room[:21])
    assert (room[21:] == 3).all() and (room[:21] != 3).all()


def test_gradient_of_a_bias_that_needs_none_is_empty() -> None:
    inputs = draw(SHAPES["several tiles"], torch.float32, torch.device("cpu"))
    _, d_bias = gated_unit_backward(
        inputs.gate_up,
        inputs.d_hidden,
        inputs.bias,
        inputs.weights,
        inputs.ends,
        ALPHA,
        LIMIT,
        False,
    )
    assert d_bias.numel() == 0


@every_shape
def test_operators_in_bf16_are_those_of_float64_on_a_gpu(
    shape: Shape, kernel_device: torch.device
) -> None:
    inputs = draw(shape, torch.bfloat16, kernel_device)
    if not fused_kernels_run_on(inputs.gate_up):
        pytest.skip("needs a GPU: the interpreter truncates bf16 stores")
    exact = inputs.in_float64()
    expected = gated_unit(exact.gate_up, exact.bias, exact.ends, ALPHA, LIMIT)
    hidden = gated_unit(inputs.gate_up, inputs.bias, inputs.ends, ALPHA, LIMIT)
    assert hidden.dtype is torch.bfloat16
    assert_close(hidden, expected, BF16_TOLERANCE)
    found = operator_backward(inputs)
    for name, gradient in operator_backward(exact).items():
        assert_close(found[name], gradient, BF16_TOLERANCE)


@every_shape
@every_dtype
def test_gradients_written_elsewhere_are_those_written_in_place(
    shape: Shape, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    inputs = draw(shape, dtype, kernel_device)
    expected = operator_backward(inputs)
    gate_up = inputs.gate_up.clone()
    d_hidden = inputs.d_hidden.clone()
    into = {"d_gate_up": torch.empty_like(gate_up), "weighted": torch.empty_like(d_hidden)}
    products, d_bias = gated_unit_backward_into(
        gate_up,
        d_hidden,
        inputs.bias,
        inputs.weights,
        inputs.ends,
        ALPHA,
        LIMIT,
        into["d_gate_up"],
        into["weighted"],
        True,
    )
    for name, found in {**into, "products": products, "d_bias": d_bias}.items():
        assert torch.equal(found, expected[name]), name
    assert torch.equal(gate_up, inputs.gate_up) and torch.equal(d_hidden, inputs.d_hidden)
