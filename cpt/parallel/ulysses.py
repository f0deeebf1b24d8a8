"""Ulysses sequence parallelism: a rank trades all heads of its tokens for all tokens of its heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509. DeepSpeed's engine is not told: outside attention a
sequence-parallel rank is an ordinary data-parallel rank that holds other tokens.

q, k and v travel in one all-to-all.  When there are more ranks than key/value heads, each of these
heads is sent to every rank whose query heads need it, and the gradients of the copies are summed on
the way back.

Shape letters: B rows, S local tokens of a row, T tokens of a row on all ranks that share it, P
ranks, H query heads, K key/value heads, h and k the local ones, x those of q, k and v together, D
head size.
"""

from __future__ import annotations

import torch

from cpt.parallel.exchange import Route, all_to_all
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology


class Ulysses:
    """The exchange around attention within one sequence-parallel group of two ranks or more.

    Layers of window `halo.window` use the halo instead, if one is given.
    """

    def __init__(self, topology: Topology, halo: WindowHalo | None = None) -> None:
        self.halo = halo
        self.size = topology.sp_size
        self.rank = topology.sp_rank
        self._group = topology.sp_group
        self._traffic = topology.traffic

    def exchange_qkv(
        self, query_BHSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give every rank all T tokens of its heads.

        Args:
            query_BHSD: All query heads of the local tokens.
            key_BKSD: All key heads of the local tokens.
            value_BKSD: All value heads of the local tokens.

        Returns:
            Query (B, h, T, D), key and value (B, k, T, D), with h = H/P and k = max(1, K/P).
        """
        num_query_heads = query_BHSD.shape[1] // self.size
        num_kv_heads = max(1, key_BKSD.shape[1] // self.size)
        parts = [
            self._split(query_BHSD, num_query_heads),
            self._split(self._one_per_rank(key_BKSD), num_kv_heads),
            self._split(self._one_per_rank(value_BKSD), num_kv_heads),
        ]
        sent_PBxSD = torch.cat(parts, dim=2)
        received_PBxSD = self._exchange(sent_PBxSD)
        ranks, batch, heads, local_tokens, head_dim = received_PBxSD.shape
        whole_BxTD = received_PBxSD.permute(1, 2, 0, 3, 4).reshape(
            batch, heads, ranks * local_tokens, head_dim
        )
        query, key, value = whole_BxTD.split([num_query_heads, num_kv_heads, num_kv_heads], dim=1)
        return query, key, value

    def exchange_out(self, out_BThD: torch.Tensor) -> torch.Tensor:
        """Give every rank all heads of its own tokens: (B, T, h, D) -> (B, S, H, D)."""
        batch, tokens, heads, head_dim = out_BThD.shape
        sent_PBShD = out_BThD.reshape(
            batch, self.size, tokens // self.size, heads, head_dim
        ).transpose(0, 1)
        received_PBShD = self._exchange(sent_PBShD)
        return received_PBShD.permute(1, 2, 0, 3, 4).reshape(
            batch, tokens // self.size, self.size * heads, head_dim
        )

    def local_sinks(self, sinks_H: torch.Tensor) -> torch.Tensor:
        """Return the sinks of this rank's query heads; another slice is a common silent error."""
        heads = sinks_H.shape[0] // self.size
        return sinks_H[self.rank * heads : (self.rank + 1) * heads]

    def _one_per_rank(self, x_BKSD: torch.Tensor) -> torch.Tensor:
        """Repeat key/value heads so that every rank gets the one that its query heads use."""
        heads = x_BKSD.shape[1]
        if self.size <= heads:
            return x_BKSD
        return x_BKSD.repeat_interleave(self.size // heads, dim=1)

    def _split(self, x_BHSD: torch.Tensor, heads: int) -> torch.Tensor:
        batch, _, tokens, head_dim = x_BHSD.shape
        return x_BHSD.reshape(batch, self.size, heads, tokens, head_dim).transpose(0, 1)

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        each = [1] * self.size
        return all_to_all(sent, Route(each, each, self._group, self._traffic, kind="ulysses"))
