"""The rotation is transformers' to the last bit in eager code, and within rounding in its kernel.

The kernel is compared with float64 and stores fp32, because Triton's interpreter truncates what it
stores in bf16. There, the operator is compared, and runs the kernel on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from cpt.model.kernels.rope import rotate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("batch", "tokens", "q_heads", "k_heads", "head_dim"),
    [(1, 3, 64, 8, 64), (2, 5, 6, 3, 20), (2, 1, 1, 1, 2), (1, 0, 4, 2, 8)],
)


class Inputs:
    """Queries, keys, angles, and the gradients of the rotated queries and keys."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        batch, tokens, q_heads, k_heads, head_dim = shape
        generator = torch.Generator().manual_seed(6)

        def projected(heads: int) -> Tensor:
            x_BSHD = torch.randn(batch, tokens, heads, head_dim, generator=generator)
            return x_BSHD.to(dtype).to(device).transpose(1, 2)

        self.q = projected(q_heads)
        self.k = projected(k_heads)
        self.d_q = projected(q_heads)
        self.d_k = projected(k_heads)
        # transformers 5.17 makes angles whose memory is (B, d, S)
        angles = 100 * torch.randn(batch, head_dim // 2, tokens, generator=generator)
        self.cos = (1.3 * angles.cos()).transpose(1, 2).to(dtype).to(device)
        self.sin = (1.3 * angles.sin()).transpose(1, 2).to(dtype).to(device)


def rotated(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return output and gradients of transformers' code by autograd in `dtype`."""
    q = inputs.q.to(dtype).detach().requires_grad_()
    k = inputs.k.to(dtype).detach().requires_grad_()
    out = apply_rotary_pos_emb(q, k, inputs.cos.to(dtype), inputs.sin.to(dtype))
    torch.autograd.backward(out, (inputs.d_q.to(dtype), inputs.d_k.to(dtype)))
    assert q.grad is not None and k.grad is not None
    return {"q": out[0].detach(), "k": out[1].detach(), "d_q": q.grad, "d_k": k.grad}


def run(inputs: Inputs) -> dict[str, Tensor]:
    """Return output and gradients of the operator."""
    q = inputs.q.detach().requires_grad_()
    k = inputs.k.detach().requires_grad_()
    out = rotate(q, k, inputs.cos, inputs.sin)
    torch.autograd.backward(out, (inputs.d_q, inputs.d_k))
    assert q.grad is not None and k.grad is not None
    return {"q": out[0].detach(), "k": out[1].detach(), "d_q": q.grad, "d_k": k.grad}


def launch(q: Tensor, k: Tensor, inputs: Inputs, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel with outputs in fp32."""
    from cpt.model.kernels import triton_rope

    outs = []
    for x_BHSD in (q, k):
        out_BSHD = torch.full_like(x_BHSD.transpose(1, 2).contiguous(), torch.nan).float()
        outs.append(out_BSHD.transpose(1, 2))
    triton_rope.rotate(q, k, inputs.cos, inputs.sin, *outs, inverse=inverse)
    return outs[0], outs[1]


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm()) if wanted.numel() else 0.0


@SHAPES
@DTYPES
def test_kernel_agrees_with_float64(
    batch: int,
    tokens: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    inputs = Inputs((batch, tokens, q_heads, k_heads, head_dim), dtype, kernel_device)
    wanted = rotated(inputs, torch.float64)
    q, k = launch(inputs.q, inputs.k, inputs, inverse=False)
    d_q, d_k = launch(inputs.d_q, inputs.d_k, inputs, inverse=True)
    found = {"q": q, "k": k, "d_q": d_q, "d_k": d_k}
    assert {name for name in wanted if error(found[name], wanted[name]) > 1e-7} == set()


@pytest.mark.parametrize("layout", ["heads first", "head by column", "one head for all"])
def test_kernel_takes_any_strides(layout: str, kernel_device: torch.device) -> None:
    inputs = Inputs((2, 5, 6, 3, 20), torch.float32, kernel_device)
    if layout == "heads first":
        inputs.q = inputs.q.contiguous()
    elif layout == "head by column":
        inputs.q = inputs.q.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        inputs.q = inputs.q[:, :1].expand(-1, 6, -1, -1)
    inputs.cos = inputs.cos[:1]
    inputs.sin = inputs.sin[:1]
    q, k = launch(inputs.q, inputs.k, inputs, inverse=False)
    wanted = rotated(inputs, torch.float64)
    assert error(q, wanted["q"]) < 1e-7
    assert error(k, wanted["k"]) < 1e-7


@SHAPES
def test_operator_agrees_with_float64_in_bf16(
    batch: int,
    tokens: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    kernel_device: torch.device,
) -> None:
    """Roundings of bf16 are 2^-9 at most; eager code rounds products and sum, and some cancel."""
    shape = (batch, tokens, q_heads, k_heads, head_dim)
    inputs = Inputs(shape, torch.bfloat16, kernel_device)
    found = run(inputs)
    wanted = rotated(inputs, torch.float64)
    assert {name for name in wanted if error(found[name], wanted[name]) > 2**-7} == set()


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_eager_code_gives_the_bits_of_transformers(
    batch: int, tokens: int, q_heads: int, k_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    shape = (batch, tokens, q_heads, k_heads, head_dim)
    inputs = Inputs(shape, dtype, torch.device("cpu"))
    found = run(inputs)
    wanted = rotated(inputs, dtype)
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()


def test_rotating_back_gives_what_was_rotated(kernel_device: torch.device) -> None:
    """The factor on cosine and sine counts twice."""
    inputs = Inputs((2, 5, 6, 3, 20), torch.float32, kernel_device)
    q, k = torch.ops.cpt.rope(inputs.q, inputs.k, inputs.cos, inputs.sin, False)
    q, k = torch.ops.cpt.rope(q, k, inputs.cos, inputs.sin, True)
    assert torch.allclose(q, 1.69 * inputs.q, atol=1e-5)
    assert torch.allclose(k, 1.69 * inputs.k, atol=1e-5)


def test_operator_has_its_shapes_without_values() -> None:
    inputs = Inputs((2, 5, 6, 3, 20), torch.float32, torch.device("cpu"))
    for inverse in (False, True):
        arguments = (inputs.q, inputs.k, inputs.cos, inputs.sin, inverse)
        torch.library.opcheck(torch.ops.cpt.rope.default, arguments)
