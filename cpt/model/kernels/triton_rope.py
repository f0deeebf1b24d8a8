"""The Triton kernel of rope.py: a program rotates all heads of one token."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 4


@triton.jit
def _rotate_heads(x, out, cos, sin, num_heads, head_stride, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Rotate the heads of the token at `x`; `cos` and `sin` are one row of a padded half."""
    heads = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, cos.shape[1])[None, :]
    inside = (heads < num_heads) & (columns < HALF)
    source = x + heads * head_stride + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out + heads * (2 * HALF) + columns
    kind = out.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(kind), mask=inside)


@triton.jit
def _rotate_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    num_tokens,
    q_heads,
    k_heads,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    angle_batch_stride,
    angle_token_stride,
    angle_stride,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_tokens
    token = row % num_tokens
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    angle = batch * angle_batch_stride + token * angle_token_stride + columns * angle_stride
    cosine = tl.load(cos + angle, mask=columns < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=columns < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    q += batch * q_batch_stride + token * q_token_stride
    k += batch * k_batch_stride + token * k_token_stride
    q_out += row * (q_heads * 2 * HALF)
    k_out += row * (k_heads * 2 * HALF)
    _rotate_heads(q, q_out, cosine, sine, q_heads, q_head_stride, HALF, Q_ROWS)
    _rotate_heads(k, k_out, cosine, sine, k_heads, k_head_stride, HALF, K_ROWS)


def rotate(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    cos_BSd: torch.Tensor,
    sin_BSd: torch.Tensor,
    q_out_BHSD: torch.Tensor,
    k_out_BKSD: torch.Tensor,
    *,
    inverse: bool,
) -> None:
    """Write the rotated heads, in the dtypes of the outputs.

    Args:
        q_BHSD: Queries, of any strides.
        k_BKSD: Keys, of any strides.
        cos_BSd: Cosines, of any strides; B may be 1.
        sin_BSd: Sines, with the strides of the cosines.
        q_out_BHSD: Memory (B, S, H, D).
        k_out_BKSD: Memory (B, S, K, D).
        inverse: Whether to rotate by the negative angles.
    """
    batch, q_heads, num_tokens, head_dim = q_BHSD.shape
    k_heads = k_BKSD.shape[1]
    if batch * num_tokens == 0:
        return
    q_BHSD = _with_dense_heads(q_BHSD)
    k_BKSD = _with_dense_heads(k_BKSD)
    half = head_dim // 2
    cos_BSd = cos_BSd.expand(batch, num_tokens, half)
    sin_BSd = sin_BSd.expand(batch, num_tokens, half)
    assert cos_BSd.stride() == sin_BSd.stride()
    _rotate_kernel[(batch * num_tokens,)](
        q_BHSD,
        k_BKSD,
        cos_BSd,
        sin_BSd,
        q_out_BHSD,
        k_out_BKSD,
        num_tokens,
        q_heads,
        k_heads,
        *q_BHSD.stride()[:3],
        *k_BKSD.stride()[:3],
        *cos_BSd.stride(),
        INVERSE=inverse,
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        Q_ROWS=triton.next_power_of_2(q_heads),
        K_ROWS=triton.next_power_of_2(k_heads),
        num_warps=NUM_WARPS,
    )


def _with_dense_heads(x_BHSD: torch.Tensor) -> torch.Tensor:
    return x_BHSD if x_BHSD.stride(3) == 1 else x_BHSD.contiguous()
