"""Triton kernels of cpt/model/kernels/loss_tiles.py; imported only where they are launched.

A program of `_statistics_kernel` walks along one row of the tile, so that a row is added up in one
order.  A program of `_gradient_kernel` has one block of one row.

Shape letters: N tokens, v words of the tile.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from data_pipeline.dataset import IGNORED_LABEL

BLOCK = 4096
"""Words that a program reads at a time."""

NUM_WARPS = 8

_IGNORED = tl.constexpr(IGNORED_LABEL)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _statistics_kernel(
    logits, label, lse, target, first, words, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * words
    before = tl.load(lse + row)
    # Finite even where all logits are -inf.
    largest = tl.maximum(before, _LOWEST)
    total = tl.exp(before - largest)
    for number in range(NUM_BLOCKS):
        column = number * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
        largest = higher
    tl.store(lse + row, largest + tl.log(total))
    at_label = tl.load(label + row) - first
    here = (at_label >= 0) & (at_label < words)
    z = tl.load(logits + at_label, mask=here, other=0.0).to(tl.float32)
    tl.store(target + row, z, mask=here)


@triton.jit
def _gradient_kernel(
    logits, label, lse, grad, pull, out, first, words, HAS_PULL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < words
    place = row * words + column
    word = tl.load(label + row)
    bears_loss = word != _IGNORED
    z = tl.load(logits + place, mask=inside & bears_loss, other=0.0).to(tl.float32)
    q = tl.exp(z - tl.load(lse + row))
    d = tl.where(column == word - first, q - 1.0, q) * tl.load(grad + row)
    if HAS_PULL:
        d += q * tl.load(pull + row)
    tl.store(out + place, tl.where(bears_loss, d, 0.0), mask=inside)


def statistics(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    target_N: torch.Tensor,
    first: int,
) -> None:
    """Do what `cpt::loss_statistics` does; the logits stay as they are."""
    _check_layout(logits_Nv, label_N, lse_N, target_N)
    num_tokens, words = logits_Nv.shape
    if num_tokens == 0:
        return
    _statistics_kernel[(num_tokens,)](
        logits_Nv,
        label_N,
        lse_N,
        target_N,
        first,
        words,
        NUM_BLOCKS=triton.cdiv(words, BLOCK),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def gradient(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    pull_N: torch.Tensor | None,
    first: int,
    *,
    out_Nv: torch.Tensor,
) -> None:
    """Write what `cpt::loss_gradient` computes to `out_Nv`, which may be the tile itself."""
    has_pull = pull_N is not None
    given_pull_N = pull_N if pull_N is not None else grad_N
    _check_layout(logits_Nv, label_N, lse_N, grad_N, given_pull_N, out_Nv)
    num_tokens, words = logits_Nv.shape
    if num_tokens == 0:
        return
    _gradient_kernel[(num_tokens, triton.cdiv(words, BLOCK))](
        logits_Nv,
        label_N,
        lse_N,
        grad_N,
        given_pull_N,
        out_Nv,
        first,
        words,
        HAS_PULL=has_pull,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def _check_layout(*tensors: torch.Tensor) -> None:
    """Refuse what the kernels would read wrongly.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} came to a "
                "loss kernel, which reads contiguous ones. Call contiguous() before."
            )
