"""RMSNorm as gpt-oss computes it, with the addition before it and the gradient that joins it.

    x      = residual + y                              (add_rms_norm; x alone is given to rms_norm)
    normed = weight * x * r,   r = 1 / sqrt(mean(x^2) + eps)
    d_x    = d_stream + r * (g - x * r^2 * mean(g * x)),   g = weight * d_normed
    d_weight = sum over tokens of d_normed * x * r

The hidden states of a layer go two ways: through the norm, and around the block that follows. Both
functions return them beside the normed ones, so that one kernel adds up the gradients of both ways.

Decisions
    - Arithmetic is fp32 whatever the dtype, as in Hugging Face's GptOssRMSNorm, and the product
      with the weight is rounded once.
    - Kept for the backward are x and the weight. 1 / rms is computed again from the row that is
      read anyway.
    - The eager backward is autograd's for Hugging Face's code, step by step, so that the numbers
      are the same to the last bit.
    - torch's `_fused_rms_norm` knows neither of the two additions and reads x and d_normed twice in
      its backward, once for each gradient.

Shape letters: M model size.
"""

from __future__ import annotations

from typing import Any

import torch

from cpt.model.kernels.availability import fused_kernels_run_on


def rms_norm(
    x_M: torch.Tensor, weight_M: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize the last dimension.

    Args:
        x_M: Hidden states (..., M).
        weight_M: The factor on each column.
        eps: Added to the mean square.

    Returns:
        The hidden states, for what goes around the next block, and the normed ones, (..., M) each.
    """
    return _Norm.apply(x_M, weight_M, eps)


def add_rms_norm(
    residual_M: torch.Tensor, y_M: torch.Tensor, weight_M: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the output of a block to what went around it, and normalize the sum.

    Args:
        residual_M: What went around the block, (..., M).
        y_M: The block's output, (..., M).
        weight_M: The factor on each column.
        eps: Added to the mean square.

    Returns:
        The sum in the dtype of the residual, and the normed sum, (..., M) each.
    """
    return _AddNorm.apply(residual_M, y_M, weight_M, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_M: torch.Tensor, weight_M: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # after the last norm nothing goes around: there is no gradient then, not one of zeros
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_M, weight_M)
        ctx.eps = eps
        return x_M, torch.ops.cpt.rms_norm(x_M, weight_M, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x_M, d_weight_M = _gradients(ctx, *grads)
        return d_x_M, d_weight_M, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual_M: torch.Tensor, y_M: torch.Tensor, weight_M: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        x_M, normed_M = torch.ops.cpt.add_rms_norm(residual_M, y_M, weight_M, eps)
        ctx.save_for_backward(x_M, weight_M)
        ctx.eps = eps
        return x_M, normed_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x_M, d_weight_M = _gradients(ctx, *grads)
        return d_x_M, d_x_M, d_weight_M, None


def _gradients(
    ctx: Any, d_stream_M: torch.Tensor | None, d_normed_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x_M, weight_M = ctx.saved_tensors
    return torch.ops.cpt.rms_norm_backward(d_normed_M, d_stream_M, x_M, weight_M, ctx.eps)


@torch.library.custom_op("cpt::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if not fused_kernels_run_on(x):
        return _eager_norm(x, weight, eps)
    from cpt.model.kernels import triton_rms_norm

    x = x.contiguous()
    normed = torch.empty_like(x)
    triton_rms_norm.norm(x, weight, eps, normed)
    return normed


@_rms_norm.register_fake
def _rms_norm_shape(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("cpt::add_rms_norm", mutates_args=())
def _add_rms_norm(
    residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not fused_kernels_run_on(residual):
        x = residual + y
        return x, _eager_norm(x, weight, eps)
    from cpt.model.kernels import triton_rms_norm

    residual = residual.contiguous()
    x = torch.empty_like(residual)
    normed = torch.empty_like(residual)
    triton_rms_norm.add_norm(residual, y.contiguous(), weight, eps, x, normed)
    return x, normed


@_add_rms_norm.register_fake
def _add_rms_norm_shape(
    residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@torch.library.custom_op("cpt::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_normed: torch.Tensor,
    d_stream: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not fused_kernels_run_on(x):
        return _eager_backward(d_normed, d_stream, x, weight, eps)
    from cpt.model.kernels import triton_rms_norm

    x = x.contiguous()
    if d_stream is not None:
        d_stream = d_stream.contiguous()
    d_x = torch.empty_like(x)
    d_weight = torch.empty_like(weight)
    triton_rms_norm.backward(d_normed.contiguous(), d_stream, x, weight, eps, d_x, d_weight)
    return d_x, d_weight


@_rms_norm_backward.register_fake
def _rms_norm_backward_shape(
    d_normed: torch.Tensor,
    d_stream: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _eager_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (weight * (wide * _inverse_rms(wide, eps))).to(x.dtype)


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _eager_backward(
    d_normed: torch.Tensor,
    d_stream: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.float32)
    inverse = _inverse_rms(wide, eps)
    d_wide = d_normed.to(torch.float32)
    tokens = tuple(range(x.ndim - 1))
    d_weight = (wide * inverse).mul_(d_wide).sum(tokens).to(weight.dtype)
    d_quotient = d_wide * weight
    d_inverse = (d_quotient * wide).sum(-1, keepdim=True)
    d_mean = d_inverse * -0.5 * inverse.pow(3)
    d_square = d_mean / x.shape[-1]
    d_x = d_quotient.mul_(inverse).add_((2 * wide).mul_(d_square)).to(x.dtype)
    if d_stream is not None:
        d_x = d_x + d_stream
    return d_x, d_weight
