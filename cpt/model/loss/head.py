"""Negative log-likelihood of the next token without ever holding all logits.

The vocabulary is walked in tiles.  The forward keeps only the log-sum-exp of every token; the
backward computes each tile of logits again and writes that tile's rows of the weight gradient once,
so nothing is accumulated in low precision.  Extra memory is a few tiles, whatever the number of
tokens.

    nll_n = lse_n - z_{n, y_n},   lse_n = log sum_v exp z_{nv},   z = hidden W^T
    dz = g_n (exp(z - lse_n) - [v = y_n]),   dhidden = dz W,   dW = dz^T hidden

In the same walk it gives the divergence from another model's distribution, where that is known
(cpt/model/loss/divergence.py).

Shape letters: N tokens, M model size, V vocabulary, v one tile of it, n tokens with a target, k
listed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpt.model.loss.divergence import Divergence, TopKTargets
from data_pipeline.dataset import IGNORED_LABEL

TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""Memory for one tile of logits in the accumulation dtype, by device: what fits the cache of a CPU
core, and what fills a GPU. `work_bytes` says what is alive at a time.
"""

SMALLEST_TILE_ROWS = 256
"""Least words of a tile: thinner matrix products are not worth the memory they save."""


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NM: torch.Tensor,
        weight_VM: torch.Tensor,
        label_N: torch.Tensor,
        targets: TopKTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        divergence = None if targets is None else _divergence(hidden_NM, weight_VM, targets)
        lse_N, target_N = _log_sum_exp_and_target(hidden_NM, weight_VM, label_N, divergence)
        ctx.save_for_backward(hidden_NM, weight_VM, label_N, lse_N)
        ctx.divergence = divergence
        nll_N = lse_N - target_N
        if divergence is None:
            return nll_N, lse_N.new_zeros(0)
        return nll_N, divergence.value()

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden_NM, weight_VM, label_N, lse_N = ctx.saved_tensors
        grad_N1 = grads[0].unsqueeze(1)
        d_hidden_NM = torch.zeros_like(hidden_NM, dtype=lse_N.dtype)
        d_weight_VM = torch.empty_like(weight_VM) if ctx.needs_input_grad[1] else None
        for first, tile_vM in _tiles(weight_VM, hidden_NM.shape[0], lse_N.dtype):
            logits_Nv = (hidden_NM @ tile_vM.T).to(lse_N.dtype)
            d_logits_Nv = logits_Nv.sub_(lse_N.unsqueeze(1)).exp_()
            pulled_nv = None
            if ctx.divergence is not None:
                pulled_nv = ctx.divergence.gradient(first, d_logits_Nv, grads[1])
            here, column = _labels_in_tile(label_N, first, tile_vM.shape[0])
            d_logits_Nv[here, column] -= 1
            d_logits_Nv.mul_(grad_N1)
            if pulled_nv is not None:
                d_logits_Nv.index_add_(0, ctx.divergence.at_n, pulled_nv)
            d_logits_Nv = d_logits_Nv.to(hidden_NM.dtype)
            d_hidden_NM += d_logits_Nv @ tile_vM
            if d_weight_VM is not None:
                torch.mm(
                    d_logits_Nv.T, hidden_NM, out=d_weight_VM[first : first + tile_vM.shape[0]]
                )
        return d_hidden_NM.to(hidden_NM.dtype), d_weight_VM, None, None


def _tile_words(weight_VM: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> int:
    return _words_of_a_tile(weight_VM.device.type, num_tokens, dtype.itemsize)


def _words_of_a_tile(device_type: str, num_tokens: int, itemsize: int) -> int:
    tile_bytes = TILE_BYTES.get(device_type, TILE_BYTES["cuda"])
    return max(SMALLEST_TILE_ROWS, tile_bytes // (max(1, num_tokens) * itemsize))


def work_bytes(device_type: str, num_tokens: int, itemsize: int) -> int:
    """Return the memory for logits and their gradient in the backward, for fp32 or narrower.

    A tile and its gradient live until the next tile has been multiplied and widened to fp32.
    """
    logits = num_tokens * _words_of_a_tile(device_type, num_tokens, 4)
    if itemsize == 4:
        return logits * 8
    return logits * 2 * (itemsize + 4)


def _tiles(
    weight_VM: torch.Tensor, num_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    rows = _tile_words(weight_VM, num_tokens, dtype)
    for first in range(0, weight_VM.shape[0], rows):
        yield first, weight_VM[first : first + rows]


def _labels_in_tile(
    label_N: torch.Tensor, first: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens whose label lies in [first, first + rows), and its position there."""
    here = ((label_N >= first) & (label_N < first + rows)).nonzero().squeeze(1)
    return here, label_N[here] - first


def _sum_dtype(hidden_NM: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden_NM.dtype, torch.float32)


def _divergence(
    hidden_NM: torch.Tensor, weight_VM: torch.Tensor, targets: TopKTargets
) -> Divergence:
    dtype = _sum_dtype(hidden_NM)
    tile_words = _tile_words(weight_VM, hidden_NM.shape[0], dtype)
    return Divergence(targets, tile_words=tile_words, vocabulary=weight_VM.shape[0], dtype=dtype)


def _log_sum_exp_and_target(
    hidden_NM: torch.Tensor,
    weight_VM: torch.Tensor,
    label_N: torch.Tensor,
    divergence: Divergence | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _sum_dtype(hidden_NM)
    lse_N = torch.full_like(label_N, float("-inf"), dtype=dtype)
    target_N = torch.zeros_like(lse_N)
    for first, tile_vM in _tiles(weight_VM, hidden_NM.shape[0], dtype):
        logits_Nv = (hidden_NM @ tile_vM.T).to(dtype)
        here, column = _labels_in_tile(label_N, first, tile_vM.shape[0])
        target_N[here] = logits_Nv[here, column]
        if divergence is not None:
            divergence.hide(first, logits_Nv)
        # Finite even where the divergence has hidden the whole tile.
        largest_N1 = logits_Nv.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        tile_lse_N = logits_Nv.sub_(largest_N1).exp_().sum(1).log_() + largest_N1.squeeze(1)
        lse_N = torch.logaddexp(lse_N, tile_lse_N)
    if divergence is not None:
        lse_N = divergence.finish(lse_N)
    return lse_N, target_N


class LossHead(nn.Linear):
    """An lm_head that, given labels, returns the loss of every token instead of the logits."""

    def forward(
        self,
        hidden: torch.Tensor,
        label: torch.Tensor | None = None,
        targets: TopKTargets | None = None,
    ) -> torch.Tensor:
        """Return the logits, or with labels the loss of every token.

        Args:
            hidden: (..., M) last hidden states.
            label: (...) next token of every position, -100 where there is none.
            targets: Another model's distribution for some of the tokens; only with labels.

        Returns:
            The logits (..., V) without labels; else the loss (...) in nats in fp32 (fp64 for fp64),
            0 where the label is -100. With targets, (2, ...): the loss, and the divergence from
            them in nats, 0 where there is none.
        """
        if label is None:
            return super().forward(hidden)
        flat_NM = hidden.reshape(-1, hidden.shape[-1])
        flat_label_N = label.reshape(-1)
        kept = (flat_label_N != IGNORED_LABEL).nonzero().squeeze(1)
        among_kept = None
        if targets is not None:
            among_kept = replace(targets, at_n=torch.searchsorted(kept, targets.at_n))
        nll, divergence = _TiledLoss.apply(
            flat_NM[kept], self.weight, flat_label_N[kept], among_kept
        )
        whole = nll.new_zeros(flat_label_N.shape)
        losses = whole.index_copy(0, kept, nll).view_as(label)
        if targets is None:
            return losses
        return torch.stack([losses, whole.index_copy(0, targets.at_n, divergence).view_as(label)])

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
        for first, tile_vM in _tiles(self.weight, num_tokens, dtype):
            found = (hidden_NM @ tile_vM.T).to(dtype).topk(min(k, tile_vM.shape[0]))
            candidates = torch.cat([best, found.values], 1)
            best, at = candidates.topk(min(k, candidates.shape[1]))
            ids_Nk = torch.cat([ids_Nk, found.indices + first], 1).gather(1, at)
        everywhere = torch.arange(num_tokens, device=ids_Nk.device)
        unknown_NK = best.new_zeros((num_tokens, k + 1))
        listed = TopKTargets(at_n=everywhere, ids_nk=ids_Nk, log_p_nK=unknown_NK)
        divergence = _divergence(hidden_NM, self.weight, listed)
        no_label_N = torch.full_like(everywhere, IGNORED_LABEL)
        _log_sum_exp_and_target(hidden_NM, self.weight, no_label_N, divergence)
        return ids_Nk, divergence.log_q_nK
