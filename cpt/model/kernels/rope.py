"""The rotation of queries and keys by their positions, as one operator.

    first'  = first cos - second sin
    second' = second cos + first sin

First and second are the halves of a head, as in Hugging Face's gpt-oss. The gradient is the
rotation by the negative angle.

Decisions
    - Queries and keys share one launch, and cosines are not copied per head.
    - The kernel computes in fp32 and rounds once; eager code rounds each product and the sum, as
      Hugging Face's code does.
    - On a GPU the results lie in memory token by token, (B, S, H, D), as the projections wrote
      their inputs and as the flash kernels read them.

Shape letters: B rows, S local tokens of a row, H query heads, K key/value heads, D head size, d
half of it.
"""

from __future__ import annotations

from typing import Any

import torch

from cpt.model.kernels.availability import fused_kernels_run_on


def rotate(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, cos_BSd: torch.Tensor, sin_BSd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated queries and keys, in the shapes in which they came.

    Args:
        q_BHSD: Queries.
        k_BKSD: Keys.
        cos_BSd: Cosine of each token's angles; B may be 1. Without a gradient.
        sin_BSd: Sine of the same angles.
    """
    return _Rotate.apply(q_BHSD, k_BKSD, cos_BSd, sin_BSd)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHSD: torch.Tensor,
        k_BKSD: torch.Tensor,
        cos_BSd: torch.Tensor,
        sin_BSd: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos_BSd, sin_BSd)
        return torch.ops.cpt.rope(q_BHSD, k_BKSD, cos_BSd, sin_BSd, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_q_BHSD, d_k_BKSD = torch.ops.cpt.rope(*grads, *ctx.saved_tensors, True)
        return d_q_BHSD, d_k_BKSD, None, None


@torch.library.custom_op("cpt::rope", mutates_args=())
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not fused_kernels_run_on(q):
        if inverse:
            sin = -sin
        return _eager_rotation(q, cos, sin), _eager_rotation(k, cos, sin)
    from cpt.model.kernels import triton_rope

    q_out = _token_by_token(q)
    k_out = _token_by_token(k)
    triton_rope.rotate(q, k, cos, sin, q_out, k_out, inverse=inverse)
    return q_out, k_out


@_rope.register_fake
def _rope_shapes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.is_cuda:
        return _token_by_token(q), _token_by_token(k)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _token_by_token(x_BHSD: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of this shape whose memory is (B, S, H, D)."""
    batch, heads, tokens, head_dim = x_BHSD.shape
    return x_BHSD.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _eager_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
