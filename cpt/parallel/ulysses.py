"""Ulysses sequence parallelism: a rank trades all heads of its tokens for all tokens of its heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509. DeepSpeed's engine is not told: outside attention a
sequence-parallel rank is an ordinary data-parallel rank that holds other tokens.

q, k and v travel in one all-to-all.  When there are more ranks than key/value heads, each of these
heads is sent to every rank whose query heads need it, and the gradients of the copies are summed on
the way back.

A rank's heads may travel in groups, so that one group is on its way while attention computes
another. Heads do not meet in attention, and the query heads of one key/value head stay in one
group: the numbers are the same, as far as a kernel computes a head alike beside others (torch's
operator for the CPU differs in last bits).

Shape letters: B rows, S local tokens of a row, T tokens of a row on all ranks that share it, P
ranks, H query heads, K key/value heads, h and k the local ones, g those of a group, x those of q, k
and v together, D head size.
"""

from __future__ import annotations

import torch

from cpt.parallel.exchange import Pending, Route, start_all_to_all
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology


class ArrivingHeads:
    """Queries, keys and values of one group of heads, on their way to this rank."""

    def __init__(self, pending: Pending, num_query_heads: int, num_kv_heads: int) -> None:
        self._pending = pending
        self._heads = [num_query_heads, num_kv_heads, num_kv_heads]

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait, and return query (B, h, T, D), key and value (B, k, T, D) of the group."""
        received_PBxSD = self._pending.finish()
        ranks, batch, heads, local_tokens, head_dim = received_PBxSD.shape
        whole_BxTD = received_PBxSD.permute(1, 2, 0, 3, 4).reshape(
            batch, heads, ranks * local_tokens, head_dim
        )
        query, key, value = whole_BxTD.split(self._heads, dim=1)
        return query, key, value


class Ulysses:
    """The exchange around attention within one sequence-parallel group of two ranks or more.

    Layers of window `halo.window` use the halo instead, if one is given.
    """

    def __init__(
        self, topology: Topology, halo: WindowHalo | None = None, head_groups: int = 1
    ) -> None:
        """Prepare the exchange.

        Args:
            topology: The layout.
            halo: Exchanges for the layers of its window.
            head_groups: Groups that a rank's heads are exchanged in, one while another is computed;
                divides its key/value heads.
        """
        self.halo = halo
        self.size = topology.sp_size
        self.rank = topology.sp_rank
        self.head_groups = head_groups
        self._group = topology.sp_group
        self._traffic = topology.traffic

    def start_qkv(
        self,
        query_BHSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        group: int,
    ) -> ArrivingHeads:
        """Begin to give every rank all T tokens of one group of its heads.

        Args:
            query_BHSD: All query heads of the local tokens.
            key_BKSD: All key heads of the local tokens.
            value_BKSD: All value heads of the local tokens.
            group: Number of the group, below `head_groups`.

        Returns:
            What arrives: a `head_groups`-th of H/P query heads and of max(1, K/P) key/value heads.
        """
        parts = [
            self._split(query_BHSD, group),
            self._split(self._one_per_rank(key_BKSD), group),
            self._split(self._one_per_rank(value_BKSD), group),
        ]
        sent_PBxSD = torch.cat(parts, dim=2)
        pending = self._start(sent_PBxSD)
        return ArrivingHeads(pending, parts[0].shape[2], parts[1].shape[2])

    def start_out(self, out_BTgD: torch.Tensor) -> Pending:
        """Begin to give every rank one group of all heads for its own tokens.

        Args:
            out_BTgD: The output of this rank's heads of the group for all tokens.
        """
        batch, tokens, heads, head_dim = out_BTgD.shape
        sent_PBSgD = out_BTgD.reshape(
            batch, self.size, tokens // self.size, heads, head_dim
        ).transpose(0, 1)
        return self._start(sent_PBSgD)

    def join_out(self, returning: list[Pending]) -> torch.Tensor:
        """Wait for the output of all groups, in order, and return (B, S, H, D)."""
        groups = [pending.finish() for pending in returning]
        received_PBShD = groups[0] if len(groups) == 1 else torch.cat(groups, dim=3)
        ranks, batch, local_tokens, heads, head_dim = received_PBShD.shape
        return received_PBShD.permute(1, 2, 0, 3, 4).reshape(
            batch, local_tokens, ranks * heads, head_dim
        )

    def local_sinks(self, sinks_H: torch.Tensor, group: int) -> torch.Tensor:
        """Return the sinks of this rank's query heads of one group.

        Another slice is a common silent error.
        """
        heads = sinks_H.shape[0] // (self.size * self.head_groups)
        first = (self.rank * self.head_groups + group) * heads
        return sinks_H[first : first + heads]

    def _one_per_rank(self, x_BKSD: torch.Tensor) -> torch.Tensor:
        """Repeat key/value heads so that every rank gets the one that its query heads use."""
        heads = x_BKSD.shape[1]
        if self.size <= heads:
            return x_BKSD
        return x_BKSD.repeat_interleave(self.size // heads, dim=1)

    def _split(self, x_BHSD: torch.Tensor, group: int) -> torch.Tensor:
        """Return the heads of one group by the rank that they go to, (P, B, g, S, D)."""
        batch, _, tokens, head_dim = x_BHSD.shape
        by_group = x_BHSD.reshape(batch, self.size, self.head_groups, -1, tokens, head_dim)
        return by_group[:, :, group].transpose(0, 1)

    def _start(self, sent: torch.Tensor) -> Pending:
        each = [1] * self.size
        route = Route(each, each, self._group, self._traffic, kind="ulysses")
        return start_all_to_all(sent, route)
