"""Window layers under sequence parallelism: the last keys and values of the left neighbour are all that is missing.

A query of a window layer sees itself and the window - 1 keys before it.  So each rank keeps all heads of its own
tokens and receives window - 1 keys and values from the rank that holds the tokens before them, instead of trading
all tokens for heads.  Backward, their gradients travel the other way and are added to those of the neighbour's own
tokens (autograd does the addition).

Kernels want as many queries as keys, so window - 1 empty queries go in front and their outputs are dropped: their
output gradient is zero, hence so is what they add to any gradient, the sinks' included.

Shape letters: B rows, S local tokens, W window, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F

from cpt.parallel.exchange import all_to_all
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

    def extend(
        self, query_BHSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put the neighbour's last W - 1 keys and values in front, and as many empty queries.

        On the first rank of a row they are zeros, which `extended_rows` keeps apart from every document.

        Returns:
            Query, key and value with W - 1 + S tokens.
        """
        reach = self.window - 1
        if not fits(key_BKSD.shape[2], self.window):
            raise ValueError(f"{key_BKSD.shape[2]} local tokens are fewer than window - 1 = {reach}: use Ulysses.")
        tail = torch.stack([key_BKSD, value_BKSD])[:, :, :, -reach:]
        first, last = self._rank == 0, self._rank == self._size - 1
        send = [int(rank == self._rank + 1) for rank in range(self._size)]
        receive = [int(rank == self._rank - 1) for rank in range(self._size)]
        arrived = all_to_all(
            tail[None][: 0 if last else 1],
            send,
            receive,
            group=self._group,
            traffic=self._traffic,
            kind="halo",
        )
        # the empty exchange of the first rank stays in the graph: its backward is the other half of a collective
        halo = torch.zeros_like(tail) + arrived.sum() if first else arrived[0]
        key, value = torch.cat([halo[0], key_BKSD], 2), torch.cat([halo[1], value_BKSD], 2)
        return F.pad(query_BHSD, (0, 0, reach, 0)), key, value

    def extended_rows(self, rows: AnyRows) -> AnyRows:
        """Documents of this rank's tokens and of the W - 1 before them.

        Args:
            rows: Documents of the whole rows.
        """
        local = rows.seq_len // self._size
        length, reach = local + self.window - 1, self.window - 1
        start = self._rank * local - reach
        bounds: list[int] = []
        for row in range(rows.batch_size):
            inner = _within(rows.bounds, row * rows.seq_len + start, row * rows.seq_len + start + length)
            if self._rank == 0:  # what lies before the row is not a document; neither does the row before lend its own
                inner = [0, reach, *(offset for offset in inner if offset > reach)]
            bounds += [row * length + offset for offset in inner]
        end = rows.batch_size * length
        return cast(AnyRows, dataclasses.replace(rows, seq_len=length, bounds=(*bounds, end)))  # type: ignore[type-var]

    def trim(self, out_BLHD: torch.Tensor) -> torch.Tensor:
        """Drop the outputs of the empty queries."""
        return out_BLHD[:, self.window - 1 :]


def _within(bounds: Sequence[int], start: int, end: int) -> list[int]:
    """Offsets of document starts in [start, end), relative to start, with 0 in front."""
    return [0, *(bound - start for bound in bounds if start < bound < end)]
