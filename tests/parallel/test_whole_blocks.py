"""Blocks of which ranks hold ranges are whole where they are worked on, and come back as ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpt.parallel.whole_blocks import Block, HeldRange, plan_rounds
from tests.support.cut_tensors import cut
from tests.support.threaded_ranks import ThreadedRanks

CPU = torch.device("cpu")


def blocks_of(numels: list[int], tensor: int) -> list[Block]:
    """Return blocks of one tensor that follow each other."""
    starts = [sum(numels[:index]) for index in range(len(numels))]
    found = []
    for start, numel in zip(starts, numels, strict=True):
        found.append(Block(tensor=tensor, offset=start, numel=numel, cost=numel))
    return found


BLOCKS = [*blocks_of([6, 6, 6], 0), *blocks_of([10], 1), *blocks_of([4, 4], 2)]
NUMELS = [18, 10, 8]
CUTS = {
    "even": [12, 24],
    "a rank with nothing": [20, 20],
    "blocks cut twice": [1, 3],
    "one rank has all": [0, 0],
}


@pytest.mark.parametrize("round_numel", [1, 12, 1000])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_every_block_is_whole_once_and_every_rank_gets_the_results_of_its_ranges(
    cuts: list[int], round_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = cut(NUMELS, cuts)
    ranks = ThreadedRanks(len(spans), monkeypatch)
    group: Any = ranks
    whole = torch.arange(float(sum(NUMELS)))
    bounds = [0, *cuts, sum(NUMELS)]
    seen: list[list[list[float]]] = [[] for _ in spans]

    def work(rank: int) -> torch.Tensor:
        held = whole[bounds[rank] : bounds[rank + 1]].clone()
        found = torch.full_like(held, -1.0)
        for one in plan_rounds(BLOCKS, spans, rank, round_numel):
            mine = one.gather(held, torch.float32, CPU, group)
            assert mine.numel() <= max(round_numel, 10)
            for start, block in zip(one.starts, one.blocks, strict=True):
                seen[rank].append(mine[start : start + BLOCKS[block].numel].tolist())
            for piece, result in one.scatter(mine * 2, CPU, group):
                found[piece.start : piece.start + piece.numel] = result
        return found

    results = torch.cat(ranks.run(work))
    assert torch.equal(results, whole * 2)
    first_of = [whole[sum(NUMELS[: b.tensor]) + b.offset] for b in BLOCKS]
    expected = []
    for start, block in zip(first_of, BLOCKS, strict=True):
        expected.append(torch.arange(float(start), float(start) + block.numel).tolist())
    assert sorted(block for mine in seen for block in mine) == sorted(expected)


def test_a_block_that_one_rank_holds_alone_stays_there_and_nothing_travels() -> None:
    spans = cut(NUMELS, [18, 28])
    for rank, mine in enumerate([(0, 1, 2), (3,), (4, 5)]):
        (one,) = plan_rounds(BLOCKS, spans, rank)
        assert one.blocks == mine
        assert not one.crosses


def test_blocks_that_all_ranks_hold_parts_of_are_divided_evenly() -> None:
    spans = []
    for rank in range(4):
        spans.append(
            {tensor: HeldRange(offset=3 * rank, start=3 * tensor, numel=3) for tensor in range(8)}
        )
    blocks = [Block(tensor=tensor, offset=0, numel=12, cost=1) for tensor in range(8)]
    assert [len(plan_rounds(blocks, spans, rank)[0].blocks) for rank in range(4)] == [2, 2, 2, 2]


def test_ranks_that_hold_a_part_of_every_tensor_get_whole_blocks_in_the_right_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under ZeRO-3: each rank works on several blocks, and has parts of each from all ranks."""
    num_ranks, part, num_tensors = 3, 4, 7
    ranks = ThreadedRanks(num_ranks, monkeypatch)
    group: Any = ranks
    numel = num_ranks * part
    whole = torch.arange(float(num_tensors * numel)).view(num_tensors, num_ranks, part)
    blocks = [Block(tensor=number, offset=0, numel=numel, cost=1) for number in range(num_tensors)]
    spans = []
    for rank in range(num_ranks):
        held = {}
        for number in range(num_tensors):
            held[number] = HeldRange(offset=part * rank, start=part * number, numel=part)
        spans.append(held)

    def work(rank: int) -> torch.Tensor:
        found = torch.full((num_tensors * part,), -1.0)
        for one in plan_rounds(blocks, spans, rank):
            mine = one.gather(whole[:, rank].flatten(), torch.float32, CPU, group)
            assert torch.equal(mine, whole[list(one.blocks)].flatten())
            for piece, result in one.scatter(mine * 2, CPU, group):
                found[piece.start : piece.start + piece.numel] = result
        return found

    results = torch.stack(ranks.run(work)).view(num_ranks, num_tensors, part)
    assert torch.equal(results.transpose(0, 1), whole * 2)
