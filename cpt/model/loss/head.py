"""Negative log-likelihood of the next token without ever holding all logits.

The vocabulary is walked in tiles (cpt/model/loss/tiles.py).  The forward keeps only the log-sum-exp
of every token; the backward computes each tile of logits again and writes that tile's rows of the
weight gradient once, so nothing is accumulated in low precision.  Extra memory is a tile, whatever
the number of tokens.

    nll_n = lse_n - z_{n, y_n},   lse_n = log sum_v exp z_{nv},   z = hidden W^T
    dz = g_n (exp(z - lse_n) - [v = y_n]),   dhidden = dz W,   dW = dz^T hidden

In the same walk it gives the divergence from another model's distribution, where that is known
(cpt/model/loss/divergence.py).

Decisions
    - On a GPU nothing here makes the host wait. So tokens without a label are left out only where
      the caller knows how many there are; else they go through, with loss and gradient 0.
    - On a CPU they are always left out.

Shape letters: N tokens, M model size, V vocabulary, v one tile of it, n tokens with a target, k
listed tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpt.model.kernels.loss_tiles import loss_gradient, loss_statistics
from cpt.model.loss.divergence import Divergence, TopKTargets
from cpt.model.loss.tiles import logit_tiles, tile_words
from data_pipeline.dataset import IGNORED_LABEL

FEW_LABELS = 0.9
"""Share of tokens with a label below which a GPU leaves the others out.

Above it the saving is small, and products of one shape are worth more than of many.
"""


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NM: torch.Tensor,
        weight_VM: torch.Tensor,
        label_N: torch.Tensor,
        targets: TopKTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        divergence = None
        if targets is not None:
            divergence = _divergence(hidden_NM, weight_VM, targets)
        lse_N, target_N = _log_sum_exp_and_target(hidden_NM, weight_VM, label_N, divergence)
        ctx.save_for_backward(hidden_NM, weight_VM, label_N, lse_N)
        ctx.divergence = divergence
        nll_N = (lse_N - target_N).masked_fill_(label_N == IGNORED_LABEL, 0)
        if divergence is None:
            return nll_N, lse_N.new_zeros(0)
        return nll_N, divergence.value()

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden_NM, weight_VM, label_N, lse_N = ctx.saved_tensors
        grad_N = grads[0].contiguous()
        divergence = ctx.divergence
        pull_N = None
        if divergence is not None:
            pull_N = divergence.pull(hidden_NM.shape[0], grads[1])
            listed_nk = divergence.listed_gradients(label_N, grad_N, grads[1]).to(hidden_NM.dtype)
        d_hidden_NM = torch.zeros_like(hidden_NM, dtype=lse_N.dtype)
        d_weight_VM = torch.empty_like(weight_VM) if ctx.needs_input_grad[1] else None
        for tile in logit_tiles(hidden_NM, weight_VM):
            d_logits_Nv = tile.logits_Nv
            loss_gradient(d_logits_Nv, label_N, lse_N, grad_N, pull_N, tile.first)
            if divergence is not None:
                divergence.put(tile, listed_nk)
            _add_product(d_hidden_NM, d_logits_Nv, tile.weight_vM)
            if d_weight_VM is not None:
                d_weight_vM = d_weight_VM[tile.first : tile.first + tile.words]
                torch.mm(d_logits_Nv.T, hidden_NM, out=d_weight_vM)
        return d_hidden_NM.to(hidden_NM.dtype), d_weight_VM, None, None


def _add_product(sum_NM: torch.Tensor, left_Nv: torch.Tensor, right_vM: torch.Tensor) -> None:
    """Add left @ right to a sum whose dtype may be wider; on a GPU inside the product."""
    if sum_NM.device.type == "cpu":
        sum_NM += left_Nv @ right_vM
    elif sum_NM.dtype == left_Nv.dtype:
        sum_NM.addmm_(left_Nv, right_vM)
    else:
        torch.addmm(sum_NM, left_Nv, right_vM, out_dtype=sum_NM.dtype, out=sum_NM)


def _sum_dtype(hidden_NM: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden_NM.dtype, torch.float32)


def _divergence(
    hidden_NM: torch.Tensor, weight_VM: torch.Tensor, targets: TopKTargets
) -> Divergence:
    words = tile_words(hidden_NM, weight_VM)
    return Divergence(targets, tile_words=words, dtype=_sum_dtype(hidden_NM))


def _log_sum_exp_and_target(
    hidden_NM: torch.Tensor,
    weight_VM: torch.Tensor,
    label_N: torch.Tensor,
    divergence: Divergence | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_N = torch.full_like(label_N, float("-inf"), dtype=_sum_dtype(hidden_NM))
    target_N = torch.zeros_like(lse_N)
    for tile in logit_tiles(hidden_NM, weight_VM):
        if divergence is not None:
            divergence.hide(tile)
        loss_statistics(tile.logits_Nv, label_N, lse_N, target_N, tile.first)
    if divergence is not None:
        return divergence.finish(lse_N, target_N, label_N)
    return lse_N, target_N


def _tokens_to_keep(label_N: torch.Tensor, num_labels: int | None) -> torch.Tensor | None:
    """Return the tokens that have a label, or None if all tokens are to go through."""
    has_label_N = label_N != IGNORED_LABEL
    if label_N.device.type == "cpu":
        return has_label_N.nonzero().squeeze(1)
    if num_labels is None or num_labels >= FEW_LABELS * label_N.shape[0]:
        return None
    return torch.nonzero_static(has_label_N, size=num_labels).squeeze(1)


class LossHead(nn.Linear):
    """An lm_head that, given labels, returns the loss of every token instead of the logits."""

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        label: torch.Tensor | None = None,
        targets: TopKTargets | None = None,
        num_labels: int | None = None,
        top_k: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, or with labels the loss of every token.

        Args:
            hidden: (..., M) last hidden states.
            label: (...) next token of every position, -100 where there is none.
            targets: Another model's distribution for some of the tokens; only with labels.
            num_labels: How many labels are not -100, if the caller knows it on the host; a wrong
                number gives wrong losses.
            top_k: With labels, what `top_k` returns for the tokens that have one, in their order,
                instead of the loss. It goes through here because ZeRO-3 gathers a module's weights
                for its forward.

        Returns:
            The logits (..., V) without labels; else the loss (...) in nats in fp32 (fp64 for fp64),
            0 where the label is -100. With targets, (2, ...): the loss, and the divergence from
            them in nats, 0 where there is none.
        """
        if label is None:
            return super().forward(hidden)
        flat_NM = hidden.reshape(-1, hidden.shape[-1])
        label_N = label.reshape(-1)
        if top_k is not None:
            return self.top_k(flat_NM[label_N != IGNORED_LABEL], top_k)
        kept = _tokens_to_keep(label_N, num_labels)
        if kept is None:
            nll_N, kl_n = _TiledLoss.apply(flat_NM, self.weight, label_N, targets)
        else:
            of_kept = targets
            if targets is not None:
                of_kept = replace(targets, at_n=torch.searchsorted(kept, targets.at_n))
            nll, kl_n = _TiledLoss.apply(
                flat_NM.index_select(0, kept), self.weight, label_N[kept], of_kept
            )
            nll_N = nll.new_zeros(label_N.shape).index_copy(0, kept, nll)
        if targets is None:
            return nll_N.view_as(label)
        kl_N = torch.zeros_like(nll_N).index_copy(0, targets.at_n, kl_n)
        return torch.stack([nll_N.view_as(label), kl_N.view_as(label)])

    @torch.no_grad()
    def top_k(self, hidden_NM: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k likeliest next tokens of every position, the likeliest first; k < V.

        Returns:
            The token ids (N, k), and the log-probabilities (N, k + 1): theirs, and that of all
            other tokens together.
        """
        dtype = _sum_dtype(hidden_NM)
        num_tokens = hidden_NM.shape[0]
        best = hidden_NM.new_empty((num_tokens, 0), dtype=dtype)
        ids_Nk = torch.empty((num_tokens, 0), dtype=torch.int64, device=hidden_NM.device)
        for tile in logit_tiles(hidden_NM, self.weight):
            found = tile.logits_Nv.to(dtype).topk(min(k, tile.words))
            candidates = torch.cat([best, found.values], 1)
            best, at = candidates.topk(min(k, candidates.shape[1]))
            ids_Nk = torch.cat([ids_Nk, found.indices + tile.first], 1).gather(1, at)
        everywhere = torch.arange(num_tokens, device=ids_Nk.device)
        unknown_NK = best.new_zeros((num_tokens, k + 1))
        listed = TopKTargets(at_n=everywhere, ids_nk=ids_Nk, log_p_nK=unknown_NK)
        divergence = _divergence(hidden_NM, self.weight, listed)
        no_label_N = torch.full_like(everywhere, IGNORED_LABEL)
        _log_sum_exp_and_target(hidden_NM, self.weight, no_label_N, divergence)
        return ids_Nk, divergence.log_q_nK
