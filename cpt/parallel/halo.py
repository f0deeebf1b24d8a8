"""Window layers under sequence parallelism: the last keys and values of the left neighbour are all
that is missing.

A query of a window layer sees itself and the window - 1 keys before it.  So each rank keeps all
heads of its own tokens and receives window - 1 keys and values from the rank that holds the tokens
before them, instead of trading all tokens for heads.  Backward, their gradients travel the other
way and are added to those of the neighbour's own tokens (autograd does the addition).

The exchange overlaps with compute: it starts, the attention within this rank's tokens runs (right
for all but the first window - 1 queries), it ends, and those few queries run again with their
neighbour's keys.  Outputs that are dropped have a zero gradient, hence add nothing to any other,
the sinks' included.

Shape letters: B rows, S local tokens, W window, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F

from cpt.parallel.exchange import Pending, start_all_to_all
from cpt.parallel.topology import Topology


class Rows(Protocol):
    """Documents of packed rows, as `cpt.model.attention.PackedRows` describes them."""

    @property
    def batch_size(self) -> int:
        """Rows."""

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the documents in the flattened tokens, then the number of tokens."""


AnyRows = TypeVar("AnyRows", bound=Rows)


def fits(local_tokens: int, window: int) -> bool:
    """Whether one neighbour holds all the keys that are missing."""
    return local_tokens >= window - 1


class WindowHalo:
    """The exchange for one window size within one sequence-parallel group."""

    def __init__(self, topology: Topology, window: int) -> None:
        self.window = window
        self._size, self._rank = topology.sp_size, topology.sp_rank
        self._group, self._traffic = topology.sp_group, topology.traffic

    def start(self, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor) -> Pending:
        """Send the last W - 1 keys and values to the right neighbour and return at once."""
        reach = self.window - 1
        if not fits(key_BKSD.shape[2], self.window):
            raise ValueError(
                f"{key_BKSD.shape[2]} local tokens are fewer than window - 1 = {reach}: use Ulysses."
            )
        tail = torch.stack([key_BKSD, value_BKSD])[None, :, :, :, -reach:]
        return start_all_to_all(
            tail[: 0 if self._rank == self._size - 1 else 1],
            [int(rank == self._rank + 1) for rank in range(self._size)],
            [int(rank == self._rank - 1) for rank in range(self._size)],
            group=self._group,
            traffic=self._traffic,
            kind="halo",
        )

    def edge(
        self,
        pending: Pending,
        query_BHSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first W - 1 tokens of this rank, with the W - 1 keys and values before them.

        On the first rank of a row those before are zeros, which `edge_rows` keeps apart from every
        document.

        Returns:
            Query, key and value with 2 (W - 1) tokens; the first W - 1 queries are empty.
        """
        reach = self.window - 1
        query, key, value = (x[:, :, :reach] for x in (query_BHSD, key_BKSD, value_BKSD))
        arrived = pending.finish()
        # the empty exchange of the first rank stays in the graph: its backward is the other half of
        # a collective
        before = (
            torch.zeros_like(torch.stack([key, value])) + arrived.sum()
            if self._rank == 0
            else arrived[0]
        )
        return (
            F.pad(query, (0, 0, reach, 0)),
            torch.cat([before[0], key], 2),
            torch.cat([before[1], value], 2),
        )

    def local_rows(self, rows: AnyRows) -> AnyRows:
        """Documents of this rank's tokens, from those of the whole rows."""
        local = rows.seq_len // self._size
        return _section(rows, self._rank * local, local)

    def edge_rows(self, rows: AnyRows) -> AnyRows:
        """Documents of what `edge` returns, from those of the whole rows."""
        reach = self.window - 1
        return _section(rows, self._rank * (rows.seq_len // self._size) - reach, 2 * reach)

    def join(self, edge_BLHD: torch.Tensor, local_BSHD: torch.Tensor) -> torch.Tensor:
        """Outputs of the first W - 1 tokens from the edge, of the rest from the local attention."""
        reach = self.window - 1
        return torch.cat([edge_BLHD[:, reach:], local_BSHD[:, reach:]], 1)


def _section(rows: AnyRows, start: int, length: int) -> AnyRows:
    """Documents of the tokens [start, start + length) of every row; what lies before a row is a
    document of its own.
    """
    bounds: list[int] = []
    for row in range(rows.batch_size):
        first = row * rows.seq_len
        offsets = [bound - first for bound in rows.bounds if first <= bound < first + rows.seq_len]
        inner = [offset - start for offset in offsets if start < offset < start + length]
        bounds += [row * length, *(row * length + offset for offset in inner)]
    end = rows.batch_size * length
    return cast(AnyRows, dataclasses.replace(rows, seq_len=length, bounds=(*bounds, end)))  # type: ignore[type-var]
