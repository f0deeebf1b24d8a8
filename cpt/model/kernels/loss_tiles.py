"""The elementwise work of the loss on one tile of logits: softmax statistics, and the gradient.

A tile comes straight from the matrix product, in the dtype of the model.  On a GPU the statistics
read it once, and the gradient reads it once and takes its place.

    torch.ops.cpt.loss_statistics    log-sum-exp and logit of the label, carried from tile to tile
    torch.ops.cpt.loss_gradient      d nll / d logits, and the part of the divergence, in place

Shape letters: N tokens, v words of the tile.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from data_pipeline.dataset import IGNORED_LABEL


def _labels_in_tile(
    label_N: torch.Tensor, first: int, words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens whose label lies in [first, first + words), and its position there."""
    here = ((label_N >= first) & (label_N < first + words)).nonzero().squeeze(1)
    return here, label_N[here] - first


@torch.library.custom_op("cpt::loss_statistics", mutates_args=("logits_Nv", "lse_N", "target_N"))
def loss_statistics(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    target_N: torch.Tensor,
    first: int,
) -> None:
    """Add a tile to the log-sum-exp of every token, and note the logits of labels in it.

    Args:
        logits_Nv: The tile, contiguous; used up.
        label_N: Word of every token, -100 or another tile's word where none is to be noted.
        lse_N: Log-sum-exp of the tiles before, -inf before the first one; updated. Its dtype is
            that of the sums, fp32 or fp64.
        target_N: Logit of every token's label; updated where the label lies in this tile.
        first: Number of the tile's first word.
    """
    if fused_kernels_run_on(lse_N):
        from cpt.model.kernels import triton_loss_tiles

        triton_loss_tiles.statistics(logits_Nv, label_N, lse_N, target_N, first)
        return
    dtype = lse_N.dtype
    here, column = _labels_in_tile(label_N, first, logits_Nv.shape[1])
    wide_Nv = logits_Nv.to(dtype)
    target_N[here] = wide_Nv[here, column]
    # Finite even where all logits are -inf.
    largest_N1 = wide_Nv.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    tile_lse_N = wide_Nv.sub_(largest_N1).exp_().sum(1).log_() + largest_N1.squeeze(1)
    torch.logaddexp(lse_N, tile_lse_N, out=lse_N)


@loss_statistics.register_fake
def _(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    target_N: torch.Tensor,
    first: int,
) -> None:
    return None


@torch.library.custom_op("cpt::loss_gradient", mutates_args=("logits_Nv",))
def loss_gradient(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    pull_N: torch.Tensor | None,
    first: int,
) -> None:
    """Replace a tile by its gradient, grad (q - [v = label]) + pull q with q = exp(logit - lse).

    Args:
        logits_Nv: The tile, contiguous; becomes the gradient, rounded once.
        label_N: Word of every token; a token with -100 has the gradient 0.
        lse_N: Log-sum-exp of all tiles, fp32 or fp64.
        grad_N: Gradient of every token's loss, in the dtype of `lse_N`.
        pull_N: Another factor of the softmax, in the dtype of `lse_N`; None for 0.
        first: Number of the tile's first word.
    """
    if fused_kernels_run_on(lse_N):
        from cpt.model.kernels import triton_loss_tiles

        triton_loss_tiles.gradient(
            logits_Nv, label_N, lse_N, grad_N, pull_N, first, out_Nv=logits_Nv
        )
        return
    ignored_N = label_N == IGNORED_LABEL
    here, column = _labels_in_tile(label_N, first, logits_Nv.shape[1])
    wide_Nv = logits_Nv.to(lse_N.dtype).sub_(lse_N.unsqueeze(1)).exp_()
    grad_N = grad_N.masked_fill(ignored_N, 0)
    if pull_N is None:
        wide_Nv[here, column] -= 1
        wide_Nv.mul_(grad_N.unsqueeze(1))
    else:
        both_N = grad_N + pull_N.masked_fill(ignored_N, 0)
        wide_Nv.mul_(both_N.unsqueeze(1))
        wide_Nv[here, column] -= grad_N[here]
    if wide_Nv.dtype != logits_Nv.dtype:
        logits_Nv.copy_(wide_Nv)


@loss_gradient.register_fake
def _(
    logits_Nv: torch.Tensor,
    label_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    pull_N: torch.Tensor | None,
    first: int,
) -> None:
    return None
