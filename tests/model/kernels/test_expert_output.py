"""The kernels of the experts' output against its eager body in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.kernels.expert_output import expert_output, expert_output_backward
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

SHAPES = {
    "several tiles": ((5, 0, 16, 33), 40),
    "columns in blocks": ((17, 2), 300),
    "one row": ((0, 1, 0), 3),
    "more tiles than are added at a time": ((1, 520), 8),
    "no rows": ((0, 0, 0), 16),
}
"""Rows of each expert, model size."""

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True)
class Inputs(KernelInputs):
    rows: torch.Tensor
    """Products in the forward, the gradient of the output in the backward."""
    products: torch.Tensor


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Weights are a column of a matrix, as they arrive from other ranks."""
    counts, size = shape
    num_rows = sum(counts)
    normal = Normal(dtype, device).draw
    return Inputs(
        rows=normal(num_rows, size),
        products=normal(num_rows).float(),
        bias=normal(len(counts), size),
        weights=normal(num_rows, 3)[:, 1],
        ends=ends_of(counts, device),
    )


def run_forward(inputs: Inputs) -> torch.Tensor:
    from cpt.model.kernels import triton_expert_output

    out = torch.empty_like(inputs.rows, dtype=torch.float32)
    triton_expert_output.forward(inputs.rows, inputs.bias, inputs.weights, inputs.ends, out)
    return out


def run_backward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    from cpt.model.kernels import triton_expert_output

    d_weights = inputs.weights.new_empty(inputs.weights.shape, dtype=torch.float32)
    d_bias = torch.empty_like(inputs.bias, dtype=torch.float32)
    triton_expert_output.backward(
        inputs.rows,
        inputs.products,
        inputs.bias,
        inputs.weights,
        inputs.ends,
        d_weights_R=d_weights,
        d_bias_EM=d_bias,
    )
    return d_weights, d_bias


def operator_forward(inputs: Inputs) -> torch.Tensor:
    out = inputs.rows.clone()
    expert_output(out, inputs.bias, inputs.weights, inputs.ends)
    return out


def operator_backward(
    inputs: Inputs, need_weights: bool = True, need_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    return expert_output_backward(
        inputs.rows,
        inputs.products,
        inputs.bias,
        inputs.weights,
        inputs.ends,
        need_weights,
        need_bias,
    )


@every_shape
@every_dtype
def test_forward_is_that_of_float64(
    shape: Shape, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    inputs = draw(shape, dtype, kernel_device)
    assert_close(run_forward(inputs), operator_forward(inputs.in_float64()), TOLERANCE)


@every_shape
@every_dtype
def test_both_gradients_are_those_of_float64(
    shape: Shape, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    inputs = draw(shape, dtype, kernel_device)
    found = run_backward(inputs)
    expected = operator_backward(inputs.in_float64())
    for gradient, exact in zip(found, expected, strict=True):
        assert_close(gradient, exact, TOLERANCE)


def test_gradients_are_those_of_autograd(kernel_device: torch.device) -> None:
    """The gradient of a weight is that of the product and of the bias together."""
    shape = SHAPES["several tiles"]
    inputs = draw(shape, torch.float32, kernel_device)
    exact = inputs.in_float64()
    bias = exact.bias.requires_grad_()
    weights = exact.weights.clone().requires_grad_()
    product = torch.randn(exact.rows.shape, dtype=torch.float64)
    inputs.products.copy_((product * exact.rows).sum(1))
    biased = product + bias.repeat_interleave(torch.tensor(shape[0]), 0)
    (biased * weights[:, None] * exact.rows).sum().backward()
    assert weights.grad is not None and bias.grad is not None
    d_weights, d_bias = run_backward(inputs)
    assert_close(d_weights, weights.grad, TOLERANCE)
    assert_close(d_bias, bias.grad, TOLERANCE)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradient_that_is_not_needed_is_empty_and_changes_no_other(need_weights: bool) -> None:
    inputs = draw(SHAPES["several tiles"], torch.float32, torch.device("cpu"))
    both = operator_backward(inputs)
    one = operator_backward(inputs, need_weights, not need_weights)
    kept, left_out = one if need_weights else reversed(one)
    assert torch.equal(kept, both[0 if need_weights else 1])
    assert left_out.numel() == 0


def test_kernel_leaves_out_the_gradient_that_is_not_needed(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_expert_output

    inputs = draw(SHAPES["several tiles"], torch.float32, kernel_device)
    d_weights, d_bias = run_backward(inputs)
    arguments = (inputs.rows, inputs.products, inputs.bias, inputs.weights, inputs.ends)
    alone = torch.empty_like(d_weights)
    triton_expert_output.backward(*arguments, d_weights_R=alone, d_bias_EM=None)
    assert torch.equal(alone, d_weights)
    alone = torch.empty_like(d_bias)
    triton_expert_output.backward(*arguments, d_weights_R=None, d_bias_EM=alone)
    assert torch.equal(alone, d_bias)


def test_two_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(((40, 0, 3), 140), torch.bfloat16, kernel_device)
    for first, second in zip(run_backward(inputs), run_backward(inputs), strict=True):
        assert torch.equal(first, second)


@every_shape
def test_operators_in_bf16_are_those_of_float64_on_a_gpu(
    shape: Shape, kernel_device: torch.device
) -> None:
    inputs = draw(shape, torch.bfloat16, kernel_device)
    if not fused_kernels_run_on(inputs.rows):
        pytest.skip("needs a GPU: the interpreter truncates bf16 stores")
    exact = inputs.in_float64()
    assert_close(operator_forward(inputs), operator_forward(exact), BF16_TOLERANCE)
    expected = operator_backward(exact)
    for gradient, wanted in zip(operator_backward(inputs), expected, strict=True):
        assert gradient.dtype is torch.bfloat16
        assert_close(gradient, wanted, BF16_TOLERANCE)
