"""Whole blocks of tensors of which every rank holds ranges: gathered, worked on, and sent back.

    plan_rounds     who works on which block, and what travels: computed alike by all ranks
    BlockRound.gather    the ranges of a round's blocks travel to the ranks that work on them
    BlockRound.scatter   the results travel back along the same ways

A block that one rank holds alone is worked on there, and stays where it is. Others are divided
among the ranks that hold a part of them, so that all have about as much work. A round is as many
blocks as a rank may have whole at once; ranks with fewer blocks take part with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpt.parallel.division import divide

ROUND_NUMEL = 1 << 25
"""Elements of the blocks that a rank has whole at once, unless one block has more."""
Group = dist.ProcessGroup | None
"""The ranks that share tensors; None if one rank has them alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive elements of a tensor that are worked on together."""

    tensor: int
    """Number of the tensor."""
    offset: int
    """First element in the tensor."""
    numel: int
    """Number of elements."""
    cost: int
    """How much work it is, in any unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldRange:
    """Consecutive elements of a tensor that a rank holds in its buffer."""

    offset: int
    """First element in the tensor."""
    start: int
    """First element in the buffer."""
    numel: int
    """Number of elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPiece:
    """What one rank holds of a block."""

    block: int
    """Number of the block."""
    holder: int
    """The rank that holds it."""
    worker: int
    """The rank that works on the block."""
    start: int
    """First element in the holder's buffer."""
    offset: int
    """First element in the block."""
    numel: int
    """Number of elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRound:
    """The blocks that the ranks of a group work on at the same time, as one rank sees them."""

    blocks: tuple[int, ...]
    """Numbers of the blocks that this rank works on."""
    starts: tuple[int, ...]
    """The first element of each of them among their elements."""
    numel: int
    """Elements of these blocks."""
    sent: tuple[BlockPiece, ...]
    """What this rank holds of the blocks of all ranks, by worker."""
    received: tuple[BlockPiece, ...]
    """What all ranks hold of this rank's blocks, by holder."""
    num_to: tuple[int, ...]
    """Elements for each rank."""
    num_from: tuple[int, ...]
    """Elements from each rank."""
    crosses: bool
    """Whether anything travels between ranks; all ranks of the group know the same."""

    def gather(
        self, buffer: torch.Tensor, dtype: torch.dtype, device: torch.device, group: Group
    ) -> torch.Tensor:
        """Return this rank's blocks, whole, one after the other, on `device`.

        Args:
            buffer: The flat tensor that holds this rank's ranges.
            dtype: Precision in which they travel and arrive.
            device: The device that works on them, and of the group.
            group: The ranks; None if there is only this one.
        """
        outgoing = torch.empty(sum(self.num_to), dtype=dtype, device=buffer.device)
        first = 0
        for piece in self.sent:
            part = buffer.narrow(0, piece.start, piece.numel)
            outgoing.narrow(0, first, piece.numel).copy_(part)
            first += piece.numel
        incoming = self._exchange(outgoing.to(device), self.num_to, self.num_from, group)
        whole = torch.empty(self.numel, dtype=dtype, device=device)
        for place, arrived in self._places(whole, incoming):
            place.copy_(arrived)
        return whole

    def scatter(
        self, whole: torch.Tensor, device: torch.device, group: Group
    ) -> list[tuple[BlockPiece, torch.Tensor]]:
        """Return this rank's ranges of the results, on `device`.

        Args:
            whole: What `gather` returned, worked on.
            device: Where the ranges are needed.
            group: As `gather` takes it.
        """
        outgoing = torch.empty(self.numel, dtype=whole.dtype, device=whole.device)
        for place, leaving in self._places(whole, outgoing):
            leaving.copy_(place)
        incoming = self._exchange(outgoing, self.num_from, self.num_to, group).to(device)
        results = []
        first = 0
        for piece in self.sent:
            results.append((piece, incoming.narrow(0, first, piece.numel)))
            first += piece.numel
        return results

    def _exchange(
        self,
        outgoing: torch.Tensor,
        num_to: tuple[int, ...],
        num_from: tuple[int, ...],
        group: Group,
    ) -> torch.Tensor:
        if not self.crosses:
            return outgoing
        incoming = outgoing.new_empty(sum(num_from))
        dist.all_to_all_single(incoming, outgoing, list(num_from), list(num_to), group=group)
        return incoming

    def _places(
        self, whole: torch.Tensor, by_holder: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the place of every received piece in the blocks, and in the order of travel."""
        start_of = dict(zip(self.blocks, self.starts, strict=True))
        places = []
        first = 0
        for piece in self.received:
            start = start_of[piece.block] + piece.offset
            place = whole.narrow(0, start, piece.numel)
            places.append((place, by_holder.narrow(0, first, piece.numel)))
            first += piece.numel
        return places


def plan_rounds(
    blocks: Sequence[Block],
    spans_by_rank: Sequence[Mapping[int, HeldRange]],
    rank: int,
    round_numel: int = ROUND_NUMEL,
) -> list[BlockRound]:
    """Return the rounds of one rank of a group.

    Args:
        blocks: The blocks of all tensors that the ranks share.
        spans_by_rank: What each rank of the group holds, by number of the tensor.
        rank: This rank in the group.
        round_numel: Elements of the blocks that a rank has whole at once, unless one has more.
    """
    pieces = [_pieces_of(number, block, spans_by_rank) for number, block in enumerate(blocks)]
    holders = {number: [piece[0] for piece in found] for number, found in enumerate(pieces)}
    costs = {number: block.cost for number, block in enumerate(blocks)}
    blocks_of = divide(costs, holders, len(spans_by_rank))
    by_round = [_rounds_of(sorted(mine), blocks, round_numel) for mine in blocks_of]
    rounds = []
    for number in range(max(map(len, by_round))):
        mine_by_rank = []
        for rounds_of_rank in by_round:
            mine_by_rank.append(rounds_of_rank[number] if number < len(rounds_of_rank) else [])
        rounds.append(_round(mine_by_rank, blocks, pieces, rank))
    return rounds


def _pieces_of(
    number: int, block: Block, spans_by_rank: Sequence[Mapping[int, HeldRange]]
) -> list[tuple[int, HeldRange]]:
    """Return what each rank holds of a block, as (rank, span); offsets count in the block."""
    found = []
    for rank, spans in enumerate(spans_by_rank):
        span = spans.get(block.tensor)
        if span is None:
            continue
        first = max(block.offset, span.offset)
        last = min(block.offset + block.numel, span.offset + span.numel)
        if first < last:
            start = span.start + first - span.offset
            part = HeldRange(offset=first - block.offset, start=start, numel=last - first)
            found.append((rank, part))
    held = sum(part.numel for _, part in found)
    assert held == block.numel, f"the ranks hold {held} of {block.numel} elements of block {number}"
    return found


def _rounds_of(mine: list[int], blocks: Sequence[Block], round_numel: int) -> list[list[int]]:
    """Divide a rank's blocks among rounds."""
    rounds: list[list[int]] = []
    numel = 0
    for number in mine:
        if not rounds or numel + blocks[number].numel > round_numel:
            rounds.append([])
            numel = 0
        rounds[-1].append(number)
        numel += blocks[number].numel
    return rounds


def _round(
    mine_by_rank: list[list[int]],
    blocks: Sequence[Block],
    pieces: list[list[tuple[int, HeldRange]]],
    rank: int,
) -> BlockRound:
    """Return a round as one rank sees it, from the blocks that each rank works on."""
    sent = []
    received = []
    crosses = False
    for worker, mine in enumerate(mine_by_rank):
        for number in mine:
            for holder, part in pieces[number]:
                crosses = crosses or holder != worker
                piece = BlockPiece(
                    block=number,
                    holder=holder,
                    worker=worker,
                    start=part.start,
                    offset=part.offset,
                    numel=part.numel,
                )
                if holder == rank:
                    sent.append(piece)
                if worker == rank:
                    received.append(piece)
    received.sort(key=lambda piece: (piece.holder, piece.block))
    num_to = [0] * len(mine_by_rank)
    num_from = [0] * len(mine_by_rank)
    for piece in sent:
        num_to[piece.worker] += piece.numel
    for piece in received:
        num_from[piece.holder] += piece.numel
    starts = []
    numel = 0
    for number in mine_by_rank[rank]:
        starts.append(numel)
        numel += blocks[number].numel
    return BlockRound(
        blocks=tuple(mine_by_rank[rank]),
        starts=tuple(starts),
        numel=numel,
        sent=tuple(sent),
        received=tuple(received),
        num_to=tuple(num_to),
        num_from=tuple(num_from),
        crosses=crosses,
    )
