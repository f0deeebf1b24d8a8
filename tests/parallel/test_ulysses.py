"""Ulysses sends the right heads and tokens at sizes that need more processes than we have.

All ranks live in one process: what a rank sends is kept, and what it receives is put together from
the others.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.parallel.traffic import Traffic
from cpt.parallel.ulysses import Ulysses

HEADS = 64
KV_HEADS = 8
HEAD_DIM = 4
LOCAL_TOKENS = 3
BATCH = 2


class SimulatedRank(Ulysses):
    """A rank whose exchange takes two passes: one fills `outbox`, one reads those of others."""

    def __init__(self, size: int, rank: int) -> None:
        topology: Any = SimpleNamespace(
            sp_size=size, sp_rank=rank, sp_group=None, traffic=Traffic()
        )
        super().__init__(topology)
        self.outbox: torch.Tensor | None = None
        self.inbox: torch.Tensor | None = None

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        self.outbox = sent
        return torch.zeros_like(sent) if self.inbox is None else self.inbox


def exchanged(ranks: list[SimulatedRank], call: Any) -> list[Any]:
    """`call(rank)` on every rank, with the exchange in between."""
    for rank in ranks:
        rank.inbox = None
        call(rank)
    for rank in ranks:
        rank.inbox = torch.stack([other.outbox[rank.rank] for other in ranks])  # type: ignore[index]
    return [call(rank) for rank in ranks]


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_every_rank_gets_its_query_heads_and_the_key_value_head_they_use(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens = size * LOCAL_TOKENS
    q, k, v = (
        torch.randn(BATCH, n, tokens, HEAD_DIM, generator=generator)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    ranks = [SimulatedRank(size, rank) for rank in range(size)]

    def part(x: torch.Tensor, rank: SimulatedRank) -> torch.Tensor:
        return x[:, :, rank.rank * LOCAL_TOKENS : (rank.rank + 1) * LOCAL_TOKENS]

    whole = exchanged(
        ranks, lambda rank: rank.exchange_qkv(part(q, rank), part(k, rank), part(v, rank))
    )
    heads = HEADS // size
    group = HEADS // KV_HEADS
    for rank, (query, key, value) in zip(ranks, whole, strict=True):
        mine = list(range(rank.rank * heads, (rank.rank + 1) * heads))
        used = sorted({head // group for head in mine})
        assert torch.equal(query, q[:, mine])
        assert torch.equal(key, k[:, used]) and torch.equal(value, v[:, used])
        assert torch.equal(rank.local_sinks(torch.arange(HEADS)), torch.tensor(mine))
    outs = exchanged(ranks, lambda rank: rank.exchange_out(whole[rank.rank][0].transpose(1, 2)))
    for rank, out in zip(ranks, outs, strict=True):
        assert torch.equal(out, part(q, rank).transpose(1, 2))
