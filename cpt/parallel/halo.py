"""Window layers under sequence parallelism need only the last keys of the left neighbor.

A query of a window layer sees itself and the window - 1 keys before it. So each rank keeps all
heads of its own tokens and receives window - 1 keys and values from the rank that holds the tokens
before them, instead of trading all tokens for heads. In the backward their gradients travel the
other way and are added to those of the neighbor's own tokens (autograd does the addition).

The exchange overlaps with compute. It starts; the attention within this rank's tokens runs, which
is right for all but the first window - 1 queries; it ends; and those few queries run again with
their neighbor's keys. Outputs that are dropped have a zero gradient, so they add nothing to any
other gradient, the sinks' included.

Shape letters: B rows, S local tokens of a row, L tokens of the edge, W window, H query heads, K
key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F

from cpt.parallel.exchange import Pending, Route, start_all_to_all
from cpt.parallel.topology import Topology


class Rows(Protocol):
    """The documents of packed rows, as `cpt.model.attention.PackedRows` describes them."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""

    @property
    def seq_len(self) -> int:
        """Tokens of each row."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the documents in the flattened tokens, then the number of tokens."""


AnyRows = TypeVar("AnyRows", bound=Rows)


def fits(local_tokens: int, window: int) -> bool:
    """Return whether one neighbor holds all the keys that are missing."""
    return local_tokens >= window - 1


class WindowHalo:
    """The exchange for one window size within one sequence-parallel group."""

    def __init__(self, topology: Topology, window: int) -> None:
        self.window = window
        self._size = topology.sp_size
        self._rank = topology.sp_rank
        self._group = topology.sp_group
        self._traffic = topology.traffic

    def start(self, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor) -> Pending:
        """Send the last W - 1 keys and values to the right neighbor and return at once."""
        reach = self.window - 1
        if not fits(key_BKSD.shape[2], self.window):
            raise ValueError(
                f"{key_BKSD.shape[2]} local tokens are fewer than window - 1 = {reach}. Use "
                "model.window_exchange: ulysses."
            )
        tail_12BKWD = torch.stack([key_BKSD, value_BKSD])[None, :, :, :, -reach:]
        if self._rank == self._size - 1:
            tail_12BKWD = tail_12BKWD[:0]  # the last rank has no right neighbor
        route = Route(
            send=self._one_for(self._rank + 1),
            receive=self._one_for(self._rank - 1),
            group=self._group,
            traffic=self._traffic,
            kind="halo",
        )
        return start_all_to_all(tail_12BKWD, route)

    def _one_for(self, neighbor: int) -> list[int]:
        """Return a count for each rank of the group: 1 for the neighbor, 0 for the others."""
        counts = [0] * self._size
        if 0 <= neighbor < self._size:
            counts[neighbor] = 1
        return counts

    def edge(
        self,
        pending: Pending,
        query_BHSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the first W - 1 tokens of this rank, with the W - 1 keys and values before them.

        On the first rank of a row those before are zeros, which `edge_rows` keeps apart from every
        document.

        Returns:
            Query, key and value with 2 (W - 1) tokens; the first W - 1 queries are empty.
        """
        reach = self.window - 1
        query = query_BHSD[:, :, :reach]
        key = key_BKSD[:, :, :reach]
        value = value_BKSD[:, :, :reach]
        arrived_12BKWD = pending.finish()
        if self._rank > 0:
            before_2BKWD = arrived_12BKWD[0]
        else:
            # Nothing arrived, but the empty exchange must stay in the graph: its backward is this
            # rank's half of a collective.
            before_2BKWD = torch.zeros_like(torch.stack([key, value])) + arrived_12BKWD.sum()
        empty_and_query = F.pad(query, (0, 0, reach, 0))
        key = torch.cat([before_2BKWD[0], key], 2)
        value = torch.cat([before_2BKWD[1], value], 2)
        return empty_and_query, key, value

    def local_rows(self, rows: AnyRows) -> AnyRows:
        """Return the documents of this rank's tokens, from those of the whole rows."""
        local = rows.seq_len // self._size
        return _section(rows, self._rank * local, local)

    def edge_rows(self, rows: AnyRows) -> AnyRows:
        """Return the documents of what `edge` returns, from those of the whole rows."""
        reach = self.window - 1
        return _section(rows, self._rank * (rows.seq_len // self._size) - reach, 2 * reach)

    def join(self, edge_BLHD: torch.Tensor, local_BSHD: torch.Tensor) -> torch.Tensor:
        """Take the outputs of the first W - 1 tokens from the edge, the rest from `local_BSHD`."""
        reach = self.window - 1
        return torch.cat([edge_BLHD[:, reach:], local_BSHD[:, reach:]], 1)


def _section(rows: AnyRows, start: int, length: int) -> AnyRows:
    """Return the documents of the tokens [start, start + length) of every row.

    What lies before a row is a document of its own.
    """
    bounds: list[int] = []
    for row in range(rows.batch_size):
        bounds.append(row * length)
        row_start = row * rows.seq_len
        for bound in rows.bounds:
            offset = bound - row_start  # from the start of this row
            is_of_row = 0 <= offset < rows.seq_len
            if is_of_row and start < offset < start + length:
                bounds.append(row * length + offset - start)
    bounds.append(rows.batch_size * length)
    section = replace(rows, seq_len=length, bounds=tuple(bounds))  # type: ignore[type-var]
    return cast(AnyRows, section)
