"""Ulysses sends the right heads and tokens, at once or in groups, and in the order that overlaps.

The ranks are threads of this process, also at sizes that need more processes than we have.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.model.attention import PackedRows, sink_attention
from cpt.parallel.ulysses import Ulysses
from tests.support.threaded_ranks import ThreadedRanks

HEADS = 64
KV_HEADS = 8
HEAD_DIM = 16
LOCAL_TOKENS = 16
"""A multiple of what a vector register holds: the tail of an exp may differ in its last bit."""
BATCH = 2


def ulysses(ranks: ThreadedRanks, rank: int, head_groups: int = 1) -> Ulysses:
    topology: Any = SimpleNamespace(
        sp_size=ranks.size, sp_rank=rank, sp_group=ranks, traffic=ranks.traffic[rank]
    )
    return Ulysses(topology, head_groups=head_groups)


def part_of(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The local tokens of a rank, of (B, heads, T, D)."""
    return x[:, :, rank * LOCAL_TOKENS : (rank + 1) * LOCAL_TOKENS]


def drawn(size: int) -> list[torch.Tensor]:
    """Query, key and value of all tokens."""
    generator = torch.Generator().manual_seed(size)
    found = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        shape = (BATCH, heads, size * LOCAL_TOKENS, HEAD_DIM)
        found.append(torch.randn(shape, generator=generator))
    return found


@pytest.mark.parametrize(
    ("size", "groups"), [(2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (2, 2), (2, 4), (4, 2)]
)
def test_every_rank_gets_its_query_heads_and_the_key_value_head_they_use(
    size: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = drawn(size)
    ranks = ThreadedRanks(size, monkeypatch)

    def exchange(rank: int) -> tuple[list[Any], torch.Tensor]:
        mine = ulysses(ranks, rank, groups)
        arriving = []
        for group in range(groups):
            arriving.append(
                mine.start_qkv(part_of(q, rank), part_of(k, rank), part_of(v, rank), group)
            )
        arrived = [pending.finish() for pending in arriving]
        returning = [mine.start_out(query.transpose(1, 2)) for query, _, _ in arrived]
        return arrived, mine.join_out(returning)

    heads = HEADS // size
    for rank, (arrived, out) in enumerate(ranks.run(exchange)):
        mine = list(range(rank * heads, (rank + 1) * heads))
        used = sorted({head // (HEADS // KV_HEADS) for head in mine})
        query, key, value = (torch.cat(parts, 1) for parts in zip(*arrived, strict=True))
        assert torch.equal(query, q[:, mine])
        assert torch.equal(key, k[:, used]) and torch.equal(value, v[:, used])
        assert torch.equal(out, part_of(q, rank).transpose(1, 2))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sinks_are_those_of_the_heads_of_each_group(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ulysses(ThreadedRanks(2, monkeypatch), 1, groups)
    parts = [mine.local_sinks(torch.arange(HEADS), group) for group in range(groups)]
    assert torch.equal(torch.cat(parts), torch.arange(HEADS // 2, HEADS))


class Attended:
    """Output and gradients of one rank's attention, and what the ranks did in which order."""

    def __init__(
        self,
        size: int,
        groups: int,
        monkeypatch: pytest.MonkeyPatch,
        kernel: str = "reference",
    ) -> None:
        self.ranks = ThreadedRanks(size, monkeypatch)
        tensors = drawn(size)
        sinks = torch.linspace(-1, 2, HEADS)
        length = size * LOCAL_TOKENS
        rows = PackedRows.from_bounds([(0, 2, length)] * BATCH, length)

        def attend(rank: int) -> list[torch.Tensor]:
            leaves = [part_of(x, rank).clone().requires_grad_() for x in tensors]
            leaves.append(sinks.clone().requires_grad_())
            out, _ = sink_attention(
                None,  # type: ignore[arg-type]
                *leaves[:3],
                None,
                scaling=0.5,
                s_aux=leaves[3],
                packed_rows=rows,
                sequence_parallel=ulysses(self.ranks, rank, groups),
                kernel=kernel,
            )
            self.ranks.note("backward")
            (out * torch.arange(out.numel()).view_as(out)).sum().backward()
            gradients = []
            for leaf in leaves:
                assert leaf.grad is not None
                gradients.append(leaf.grad)
            return [out.detach(), *gradients]

        self.results = self.ranks.run(attend)


@pytest.mark.parametrize(("size", "groups"), [(2, 2), (2, 4), (4, 2)])
def test_groups_of_heads_give_output_and_gradients_bit_for_bit(
    size: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = Attended(size, 1, monkeypatch)
    in_groups = Attended(size, groups, monkeypatch)
    for want, got in zip(at_once.results, in_groups.results, strict=True):
        for one, other in zip(want, got, strict=True):
            assert torch.equal(one, other)
    for want_sent, sent in zip(at_once.ranks.traffic, in_groups.ranks.traffic, strict=True):
        assert want_sent.take() == sent.take()


def test_groups_of_heads_give_the_same_numbers_with_the_operator_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = Attended(2, 1, monkeypatch, kernel="cpu")
    in_groups = Attended(2, 2, monkeypatch, kernel="cpu")
    for want, got in zip(at_once.results, in_groups.results, strict=True):
        for one, other in zip(want, got, strict=True):
            assert (one - other).norm() <= 1e-6 * one.norm()


def test_one_group_travels_while_another_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 2 bring the groups, 3 and 4 take their output back; 5 to 8 are the gradients."""
    events = Attended(2, 2, monkeypatch).ranks.events
    forward = ["start 1", "start 2", "wait 1", "start 3", "wait 2", "start 4", "wait 3", "wait 4"]
    backward = ["start 5", "start 6", "wait 5", "start 7", "wait 6", "start 8", "wait 7", "wait 8"]
    assert events == [[*forward, "backward", *backward]] * 2
