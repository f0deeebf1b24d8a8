"""Measurement of the rate between every two nodes of a run, in seconds.

    rounds of the tournament -> each rank meets the rank in its own place on the other node
        -> both send at once -> a rate of each pair of ranks -> their sum is that of the nodes

Decisions
    The group is one of its own and is destroyed afterwards: NCCL keeps buffers on the device for
    every peer that it has sent to.
    All ranks begin a round together, so nobody's wait for a partner counts as its link's time.
    How much a pair sends follows from a first small message, so that a slow link costs no more time
    than a fast one.
    No further round begins once the time is up; three are made in any case, for with one partner
    alone a node cannot be told from its partner.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cpt.parallel.agreement import gather_json
from cpt.parallel.node_rates import Node, NodeRates, PairRate, tournament
from cpt.parallel.topology import Topology

BUDGET_SECONDS = 5.0
"""Time after which no further round begins."""
LEAST_ROUNDS = 3
"""Rounds that are made however long they take."""
FIRST_BYTES = 2**20
"""Size of the message that connects a pair, and of the one that tells how fast it is."""
LARGEST_BYTES = 2**26
"""Size of the largest message; buffers of twice that size are taken from the device."""
MESSAGE_SECONDS = 0.05
"""Time that a measured message should take."""
REPEATS = 3
"""Messages that are measured; the fastest counts."""


def measure(nodes: Sequence[Node], topology: Topology) -> NodeRates:
    """Measure the rates between nodes; every rank calls this at the same time.

    Args:
        nodes: The nodes of the run, at least two.
        topology: The ranks of the run.

    Returns:
        The same rates on every rank.
    """
    started = time.perf_counter()
    group = dist.new_group()
    # NCCL lets some ranks of a group send only after all of them have met in it once
    dist.all_reduce(torch.zeros(1, device=topology.device), group=group)
    probe = _Probe(topology.device, group)
    mine: list[tuple[int, int, float]] = []
    for index, pairs in enumerate(tournament(len(nodes))):
        elapsed = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=topology.control_group)
        if index >= LEAST_ROUNDS and elapsed.item() > BUDGET_SECONDS:
            break
        meeting = find_meeting(pairs, nodes, topology.rank)
        if meeting is None:
            continue
        first, second, peer = meeting
        gbit = probe.gbit_with(peer)
        if topology.rank < peer:
            mine.append((first, second, gbit))
    del probe
    dist.destroy_process_group(group)
    if topology.device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    found = gather_json({"rates": mine, "seconds": seconds}, topology.control_group)
    return NodeRates(
        nodes=tuple(nodes),
        pairs=tuple(summed([of_rank["rates"] for of_rank in found])),
        seconds=max(of_rank["seconds"] for of_rank in found),
    )


def find_meeting(
    pairs: Sequence[tuple[int, int]], nodes: Sequence[Node], rank: int
) -> tuple[int, int, int] | None:
    """Return (node, node, peer) of a rank in a round; None if it rests.

    The peer is the rank with the same place on the other node.  Where one node has more ranks than
    the other, those in excess rest.
    """
    for first, second in pairs:
        for peers in zip(nodes[first].ranks, nodes[second].ranks, strict=False):
            if rank in peers:
                peer = peers[1] if rank == peers[0] else peers[0]
                return first, second, peer
    return None


def summed(found: Sequence[Sequence[tuple[int, int, float]]]) -> list[PairRate]:
    """Return the rate of each pair of nodes: the sum over their pairs of ranks."""
    rates: dict[tuple[int, int], float] = {}
    for of_rank in found:
        for first, second, gbit in of_rank:
            rates[first, second] = rates.get((first, second), 0.0) + gbit
    pairs = []
    for (first, second), gbit in sorted(rates.items()):
        pairs.append(PairRate(first=first, second=second, gbit=gbit))
    return pairs


class _Probe:
    """Sends to and receives from one rank after the other."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self._device = device
        self._group = group
        self._outgoing = torch.zeros(LARGEST_BYTES, dtype=torch.uint8, device=device)
        self._incoming = torch.empty_like(self._outgoing)

    def gbit_with(self, peer: int) -> float:
        """Return the rate in Gbit/s in each direction while both ranks send."""
        self._seconds(FIRST_BYTES, peer)  # connects
        first = self._slower_of_both(self._seconds(FIRST_BYTES, peer), peer)
        wanted = int(FIRST_BYTES * MESSAGE_SECONDS / first)
        size = min(max(wanted, FIRST_BYTES), LARGEST_BYTES)
        fastest = min(self._seconds(size, peer) for _ in range(REPEATS))
        return 8 * size / fastest / 1e9

    def _slower_of_both(self, seconds: float, peer: int) -> float:
        """Return the larger of both ranks' times, so that both send as much."""
        mine = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        theirs = torch.empty_like(mine)
        self._exchange(mine, theirs, peer)
        return max(seconds, theirs.item())

    def _seconds(self, size: int, peer: int) -> float:
        """Return how long it takes until `size` bytes have gone and come."""
        self._wait_for_device()
        started = time.perf_counter()
        self._exchange(self._outgoing[:size], self._incoming[:size], peer)
        self._wait_for_device()
        return time.perf_counter() - started

    def _exchange(self, outgoing: torch.Tensor, incoming: torch.Tensor, peer: int) -> None:
        # in a batch NCCL uses the group's communicator; alone, it would make one for each pair
        operations = [
            dist.P2POp(dist.isend, outgoing, peer, self._group),
            dist.P2POp(dist.irecv, incoming, peer, self._group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
