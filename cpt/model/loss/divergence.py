"""The divergence of the model's next-token distribution from one known by its k likeliest tokens.

The other distribution p has k + 1 parts: its k likeliest tokens, and all other tokens as one.  The
model's own q is added up to the same parts, so that both sum to 1 and

    KL(p || q) = sum_j p_j (log p_j - log q_j) + p_r (log p_r - log q_r)  >= 0,  and 0 where q has
    the parts of p
    dKL/dz_v   = q_v - p_v  for a listed token v,   q_v (1 - p_r / q_r)  for any other

with z the logits, q = softmax(z) and r the other tokens together.  By the data-processing
inequality this is at most the divergence over the whole vocabulary.

Decisions
    - q_r comes from a log-sum-exp over the other tokens alone: 1 - sum_j q_j would cancel where the
      listed ones hold nearly everything.
    - Nothing here holds more than one tile of logits; the loss head hands each tile to `Divergence`
      in turn.

Shape letters: N tokens of the loss, n those of them with a target, k listed tokens, K = k + 1, v a
tile of the words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_EXPONENT = 60.0
"""Largest exponent of p_r / q_r in the gradient.

The ratio is multiplied by q_v, which is 0 in fp32 before the ratio grows to infinity.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKTargets:
    """The next-token distribution of another model for some of the tokens of a batch."""

    at_n: torch.Tensor
    """(n,) int64: which tokens of the flattened batch, ascending; each of them has a label."""
    ids_nk: torch.Tensor
    """(n, k) int64: the likeliest tokens."""
    log_p_nK: torch.Tensor
    """(n, k + 1): their log-probabilities in nats; the last column is that of all other tokens
    together.
    """


class Divergence:
    """KL(p || q) over tiles of logits.

    The forward calls `hide` on each tile and then `finish`; the backward calls `gradient` on each.
    """

    def __init__(
        self, targets: TopKTargets, *, tile_words: int, vocabulary: int, dtype: torch.dtype
    ) -> None:
        """Sort the listed tokens by tile.

        Args:
            targets: `at_n` counts the tokens of the loss.
            tile_words: Words of a tile; the last one may have fewer.
            vocabulary: Words in all.
            dtype: Dtype of the sums.
        """
        self.at_n = targets.at_n
        """(n,): tokens that have a target."""
        self._top_k = targets.ids_nk.shape[1]
        self._tile_words = tile_words
        self._log_p_nK = targets.log_p_nK.to(dtype)
        ids = targets.ids_nk.reshape(-1)
        self._order = ids.argsort()
        self._sorted_ids = ids[self._order]
        starts = torch.arange(0, vocabulary + tile_words, tile_words, device=ids.device)
        self._bounds: list[int] = torch.searchsorted(self._sorted_ids, starts).tolist()
        self._z_nk = torch.empty_like(targets.ids_nk, dtype=dtype)

    def _listed(self, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the listed tokens of the tile that starts at word `first`.

        They come as places in (n, k), rows in n, and columns in the tile.
        """
        number = first // self._tile_words
        span = slice(self._bounds[number], self._bounds[number + 1])
        place = self._order[span]
        return place, place // self._top_k, self._sorted_ids[span] - first

    def hide(self, first: int, logits_Nv: torch.Tensor) -> None:
        """Note the logits of listed tokens and take them out of the tile.

        The log-sum-exp of the tile is then that of the other tokens.
        """
        place, row, column = self._listed(first)
        self._z_nk.view(-1)[place] = logits_Nv[self.at_n[row], column]
        logits_Nv[self.at_n[row], column] = float("-inf")

    def finish(self, lse_N: torch.Tensor) -> torch.Tensor:
        """Return the log-sum-exp of all tokens, from that of the tokens that were not hidden."""
        others_n = lse_N[self.at_n]
        whole_n = torch.logaddexp(others_n, self._z_nk.logsumexp(1))
        log_q_nK = torch.cat([self._z_nk, others_n.unsqueeze(1)], 1) - whole_n.unsqueeze(1)
        self.log_q_nK = log_q_nK
        """(n, K): the model's own log-probabilities of the same parts."""
        return lse_N.index_copy(0, self.at_n, whole_n)

    def value(self) -> torch.Tensor:
        """Return the divergence (n,) in nats."""
        return (self._log_p_nK.exp() * (self._log_p_nK - self.log_q_nK)).sum(1)

    def gradient(self, first: int, softmax_Nv: torch.Tensor, grad_n: torch.Tensor) -> torch.Tensor:
        """Return the gradient (n, v) of a tile's logits, for the tokens `at_n`."""
        place, row, column = self._listed(first)
        others_n = (self._log_p_nK[:, -1] - self.log_q_nK[:, -1]).clamp(max=LARGEST_EXPONENT).exp_()
        d_nv = softmax_Nv[self.at_n] * (grad_n * (1 - others_n)).unsqueeze(1)
        p = self._log_p_nK[:, :-1].reshape(-1)[place].exp()
        d_nv[row, column] = (softmax_Nv[self.at_n[row], column] - p) * grad_n[row]
        return d_nv
