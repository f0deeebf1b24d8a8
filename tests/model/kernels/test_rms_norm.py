"""RMSNorm is transformers' to the last bit in eager code, and within rounding in its kernels.

Kernels are compared with float64. They store fp32 here, because Triton's interpreter truncates what
it stores in bf16; the operators are compared in bf16 as well, and run the kernels on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from cpt.model.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 90), (33, 48), (3, 2880)], ids=str)
"""Odd sizes, more rows than one program sums, and the size of the large models."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NAMES = ("x", "normed", "d_x", "d_weight")


class Inputs:
    """Values of a norm, its weight, and the gradients of its two outputs."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x, self.y, self.d_stream, self.d_normed = (
            torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4)
        )
        self.x *= 4
        self.weight = torch.randn(shape[-1], generator=generator).to(dtype).to(device)


def expected(inputs: Inputs, *, add: bool, stream: bool = True) -> dict[str, Tensor]:
    """Return output and gradients by autograd in float64."""
    x = inputs.x.double()
    if add:
        x = x + inputs.y.double()
    x = x.detach().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    normed = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    outputs = [normed]
    gradients = [inputs.d_normed.double()]
    if stream:
        outputs.append(x * 1)
        gradients.append(inputs.d_stream.double())
    torch.autograd.backward(outputs, gradients)
    values = (x.detach(), normed.detach(), x.grad, weight.grad)
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@SHAPES
@DTYPES
def test_norm_kernel_agrees_with_float64(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_rms_norm

    inputs = Inputs(shape, dtype, kernel_device)
    normed = torch.empty_like(inputs.x, dtype=torch.float32)
    triton_rms_norm.norm(inputs.x, inputs.weight, EPS, normed)
    assert error(normed, expected(inputs, add=False)["normed"]) < 2e-7


@SHAPES
@DTYPES
def test_add_norm_kernel_agrees_with_float64(
    shape: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_rms_norm

    inputs = Inputs(shape, dtype, kernel_device)
    x = torch.empty_like(inputs.x, dtype=torch.float32)
    normed = torch.empty_like(x)
    triton_rms_norm.add_norm(inputs.x, inputs.y, inputs.weight, EPS, x, normed)
    wanted = expected(inputs, add=True)
    assert error(x, wanted["x"]) < 1e-7
    assert error(normed, wanted["normed"]) < 2e-7


@SHAPES
@DTYPES
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "last norm"])
def test_backward_kernel_agrees_with_float64(
    shape: tuple[int, ...], dtype: torch.dtype, stream: bool, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_rms_norm

    inputs = Inputs(shape, dtype, kernel_device)
    d_x = torch.empty_like(inputs.x, dtype=torch.float32)
    d_weight = torch.empty_like(inputs.weight, dtype=torch.float32)
    d_stream = inputs.d_stream if stream else None
    triton_rms_norm.backward(inputs.d_normed, d_stream, inputs.x, inputs.weight, EPS, d_x, d_weight)
    wanted = expected(inputs, add=False, stream=stream)
    assert error(d_x, wanted["d_x"]) < 3e-7
    assert error(d_weight, wanted["d_weight"]) < 3e-7


def test_kernels_take_extreme_rows(kernel_device: torch.device) -> None:
    """Of a row of zeros the gradient is large; squares of 1e15 are near the end of fp32."""
    from cpt.model.kernels import triton_rms_norm

    inputs = Inputs((3, 48), torch.float32, kernel_device)
    inputs.x[0] = 0
    inputs.x[1] *= 1e15
    normed = torch.empty_like(inputs.x)
    d_x = torch.empty_like(inputs.x)
    d_weight = torch.empty_like(inputs.weight)
    triton_rms_norm.norm(inputs.x, inputs.weight, EPS, normed)
    triton_rms_norm.backward(
        inputs.d_normed, inputs.d_stream, inputs.x, inputs.weight, EPS, d_x, d_weight
    )
    wanted = expected(inputs, add=False)
    assert torch.equal(normed[0], torch.zeros_like(normed[0]))
    for row in range(1, 3):
        assert error(normed[row], wanted["normed"][row]) < 3e-7
    for row in range(3):
        assert error(d_x[row], wanted["d_x"][row]) < 3e-7


def test_kernels_take_no_rows(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_rms_norm

    inputs = Inputs((0, 48), torch.float32, kernel_device)
    d_weight = torch.full_like(inputs.weight, torch.nan)
    triton_rms_norm.norm(inputs.x, inputs.weight, EPS, torch.empty_like(inputs.x))
    triton_rms_norm.backward(
        inputs.d_normed, None, inputs.x, inputs.weight, EPS, torch.empty_like(inputs.x), d_weight
    )
    assert torch.equal(d_weight, torch.zeros_like(d_weight))


def run(inputs: Inputs, *, add: bool) -> dict[str, Tensor]:
    """Return output and gradients of the operators."""
    x = inputs.x.clone().requires_grad_()
    y = inputs.y.clone().requires_grad_()
    weight = inputs.weight.clone().requires_grad_()
    if add:
        total, normed = add_rms_norm(x, y, weight, EPS)
    else:
        total, normed = rms_norm(x, weight, EPS)
    torch.autograd.backward([total * 1, normed], [inputs.d_stream, inputs.d_normed])
    if add:
        assert torch.equal(x.grad, y.grad)
    values = (total.detach(), normed.detach(), x.grad, weight.grad)
    return dict(zip(NAMES, values, strict=True))


@SHAPES
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add and norm"])
def test_operators_agree_with_float64_in_bf16(
    shape: tuple[int, ...], add: bool, kernel_device: torch.device
) -> None:
    """Roundings of bf16 are 2^-9 at most; eager code rounds d_x twice, and the sum first."""
    inputs = Inputs(shape, torch.bfloat16, kernel_device)
    found = run(inputs, add=add)
    wanted = expected(inputs, add=add)
    assert {name for name in NAMES if error(found[name], wanted[name]) > 2**-8} == set()


def test_two_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    inputs = Inputs((33, 48), torch.bfloat16, kernel_device)
    first = run(inputs, add=True)
    second = run(inputs, add=True)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@SHAPES
@DTYPES
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add and norm"])
def test_eager_code_gives_the_bits_of_transformers(
    shape: tuple[int, ...], dtype: torch.dtype, add: bool
) -> None:
    inputs = Inputs(shape, dtype, torch.device("cpu"))
    norm = GptOssRMSNorm(shape[-1], EPS)
    norm.weight = torch.nn.Parameter(inputs.weight)
    x = inputs.x.clone().requires_grad_()
    total = x + inputs.y if add else x * 1
    # a node of its own, as the engine's hooks make one: the norm's gradient is complete when the
    # one of the stream is added
    normed = norm(total.view_as(total))
    torch.autograd.backward([total * 1, normed], [inputs.d_stream, inputs.d_normed])
    found = run(inputs, add=add)
    wanted = dict(zip(NAMES, (total, normed, x.grad, norm.weight.grad), strict=True))
    assert {name for name in NAMES if not torch.equal(found[name], wanted[name])} == set()


@pytest.mark.parametrize("shape", [(4, 6, 48), (0, 48)], ids=str)
def test_operators_have_their_shapes_without_values(shape: tuple[int, ...]) -> None:
    x, y, d = (torch.randn(shape) for _ in range(3))
    weight = torch.randn(48)
    torch.library.opcheck(torch.ops.cpt.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.cpt.add_rms_norm.default, (x, y, weight, EPS))
    for d_stream in (d, None):
        arguments = (y, d_stream, x, weight, EPS)
        torch.library.opcheck(torch.ops.cpt.rms_norm_backward.default, arguments)
