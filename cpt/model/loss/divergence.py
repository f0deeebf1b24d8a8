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
    - All listed tokens are looked up in every tile, and those of other tiles go to a place that is
      no logit. To sort them by tile would make the host wait for the device.

Shape letters: N tokens of the loss, n those of them with a target, k listed tokens, K = k + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.loss.tiles import LogitTile

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

    The forward calls `hide` on each tile and then `finish`.  The backward multiplies the softmax by
    `pull`, except for listed tokens, whose gradients it gets from `listed_gradients` and writes
    with `put` over those of each tile.
    """

    def __init__(self, targets: TopKTargets, *, tile_words: int, dtype: torch.dtype) -> None:
        """Find the tile of every listed token, and its place there.

        Args:
            targets: `at_n` counts the tokens of the loss.
            tile_words: Words of a tile; the last one may have fewer.
            dtype: Dtype of the sums.
        """
        self.at_n = targets.at_n
        """(n,): tokens that have a target."""
        self._ids_nk = targets.ids_nk
        self._log_p_nK = targets.log_p_nK.to(dtype)
        self._z_nk = torch.zeros_like(targets.ids_nk, dtype=dtype)
        self._tile_words = tile_words
        self._tile_nk = targets.ids_nk // tile_words
        self._column_nk = targets.ids_nk % tile_words
        self._place_nk = self._place(tile_words)

    def _place(self, words: int) -> torch.Tensor:
        """Return the places (n, k) of listed tokens in the memory of tiles with so many words."""
        return self._column_nk + self.at_n.unsqueeze(1) * words

    def _places(self, tile: LogitTile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which listed tokens (n, k) lie in the tile, and their places in its memory."""
        inside_nk = self._tile_nk == tile.first // self._tile_words
        place_nk = self._place_nk
        if tile.words < self._tile_words:
            place_nk = self._place(tile.words)
        nowhere = place_nk.new_full((), tile.memory.numel() - 1)
        return inside_nk, torch.where(inside_nk, place_nk, nowhere)

    def hide(self, tile: LogitTile) -> None:
        """Note the logits of listed tokens and take them out of the tile.

        The log-sum-exp of the tile is then that of the other tokens.
        """
        inside_nk, place_nk = self._places(tile)
        logits_nk = tile.memory[place_nk].to(self._z_nk.dtype)
        self._z_nk = torch.where(inside_nk, logits_nk, self._z_nk)
        tile.memory.scatter_(0, place_nk.view(-1), float("-inf"))

    def finish(
        self, lse_N: torch.Tensor, target_N: torch.Tensor, label_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Complete the sums that lack what was hidden.

        Args:
            lse_N: Log-sum-exp of the tokens that were not hidden.
            target_N: Logit of the label; -inf where the label was hidden.
            label_N: The labels.

        Returns:
            The log-sum-exp of all tokens, and the logits of the labels.
        """
        others_n = lse_N[self.at_n]
        whole_n = torch.logaddexp(others_n, self._z_nk.logsumexp(1))
        log_q_nK = torch.cat([self._z_nk, others_n.unsqueeze(1)], 1) - whole_n.unsqueeze(1)
        self.log_q_nK = log_q_nK
        """(n, K): the model's own log-probabilities of the same parts."""
        is_label_nk = self._is_label(label_N)
        listed_n = self._z_nk.masked_fill(~is_label_nk, 0).sum(1)
        target_n = torch.where(is_label_nk.any(1), listed_n, target_N[self.at_n])
        return (
            lse_N.index_copy(0, self.at_n, whole_n),
            target_N.index_copy(0, self.at_n, target_n),
        )

    def _is_label(self, label_N: torch.Tensor) -> torch.Tensor:
        """Return which listed tokens (n, k) are the label."""
        return self._ids_nk == label_N[self.at_n].unsqueeze(1)

    def value(self) -> torch.Tensor:
        """Return the divergence (n,) in nats."""
        return (self._log_p_nK.exp() * (self._log_p_nK - self.log_q_nK)).sum(1)

    def pull(self, num_tokens: int, grad_n: torch.Tensor) -> torch.Tensor:
        """Return what multiplies the softmax of tokens that are not listed, (N,).

        It is 0 where there is no target.
        """
        others_n = (self._log_p_nK[:, -1] - self.log_q_nK[:, -1]).clamp(max=LARGEST_EXPONENT).exp_()
        return grad_n.new_zeros(num_tokens).index_copy(0, self.at_n, grad_n * (1 - others_n))

    def listed_gradients(
        self, label_N: torch.Tensor, nll_grad_N: torch.Tensor, grad_n: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradients (n, k) of the logits of listed tokens, of loss and divergence.

        Args:
            label_N: The labels.
            nll_grad_N: Gradient of every token's loss.
            grad_n: Gradient of every divergence.
        """
        q_nk = self.log_q_nK[:, :-1].exp()
        p_nk = self._log_p_nK[:, :-1].exp()
        from_loss_nk = (q_nk - self._is_label(label_N).to(q_nk.dtype)) * nll_grad_N[
            self.at_n
        ].unsqueeze(1)
        return from_loss_nk + (q_nk - p_nk) * grad_n.unsqueeze(1)

    def put(self, tile: LogitTile, listed_nk: torch.Tensor) -> None:
        """Write the gradients of listed tokens that lie in the tile to their places.

        Args:
            tile: Holds the gradients of all other tokens.
            listed_nk: What `listed_gradients` returned, in the dtype of the tile.
        """
        _, place_nk = self._places(tile)
        tile.memory.scatter_(0, place_nk.view(-1), listed_nk.view(-1))
