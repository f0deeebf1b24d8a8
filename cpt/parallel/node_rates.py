"""Which ranks form a node, which nodes meet in which round, and which nodes are slow.

Pure functions and values; `cpt.parallel.link_probe` measures.

Decisions
    The rate of two nodes is the sum over their pairs of ranks, so a node with fewer ranks than the
    others moves less where every rank has an adapter of its own, and as much where all share one.
    It is slow only if it is slow by the sum and by the rate per pair of ranks.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SLOW_SHARE = 0.5
"""A node or pair below this share of the median is called slow."""
MOST_NAMED = 8
"""Number of nodes or pairs that a message names one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """The ranks that share a node."""

    name: str
    """Host name; a second node on the same host, as in tests, is `name#2`."""
    host: str
    """Host name alone."""
    ranks: tuple[int, ...]
    """Ranks of the node, by local rank."""


def nodes_of(places: Sequence[tuple[str, int]]) -> list[Node]:
    """Return the nodes in the order of their first ranks.

    A node is a host name, and a local rank that comes again on a host begins another node. Thus
    launchers may lay ranks out node by node or in turn.

    Args:
        places: (host name, local rank) of each rank.
    """
    seen: Counter[tuple[str, int]] = Counter()
    members: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for rank, place in enumerate(places):
        host, local_rank = place
        seen[place] += 1
        members.setdefault((host, seen[place]), []).append((local_rank, rank))
    nodes = []
    for (host, copy), ranks in members.items():
        name = host if copy == 1 else f"{host}#{copy}"
        nodes.append(Node(name=name, host=host, ranks=tuple(rank for _, rank in sorted(ranks))))
    return nodes


def tournament(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs in which every node meets every other one once.

    The circle method: the first player stays, the others move on by one place in each round.  In a
    round no node is in two pairs, so pairs do not disturb each other at their own ends.

    Args:
        num_nodes: Number of nodes; with an odd number one of them rests in each round.
    """
    players: list[int | None] = list(range(num_nodes))
    if num_nodes % 2:
        players.append(None)
    half = len(players) // 2
    rounds = []
    for _ in range(len(players) - 1):
        pairs = []
        for first, second in zip(players[:half], reversed(players[half:]), strict=True):
            if first is not None and second is not None:
                pairs.append((min(first, second), max(first, second)))
        rounds.append(sorted(pairs))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRate:
    """The rate between two nodes."""

    first: int
    """Index of a node."""
    second: int
    """Index of another node, larger than `first`."""
    gbit: float
    """Gbit/s in each direction while both send, over all ranks of the nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRates:
    """The rates between the nodes of a run."""

    nodes: tuple[Node, ...]
    """The nodes of the run."""
    pairs: tuple[PairRate, ...]
    """The pairs that were measured; every node is in one at least."""
    seconds: float
    """Time that the measurement took."""

    def of_nodes(self) -> list[float]:
        """Return the rate of each node: that to the node which it reaches best, in Gbit/s.

        A node is not to blame for a slow partner, but a slow node is slow with every partner.
        """
        return self._best([pair.gbit for pair in self.pairs])

    def _best(self, gbits: Sequence[float]) -> list[float]:
        """Return the highest rate of each node, given one for each pair of nodes."""
        best = [0.0] * len(self.nodes)
        for pair, gbit in zip(self.pairs, gbits, strict=True):
            best[pair.first] = max(best[pair.first], gbit)
            best[pair.second] = max(best[pair.second], gbit)
        return best

    def _as_of_full_nodes(self) -> list[float]:
        """Return the rate of each pair of nodes if both had as many ranks as the largest node has.

        Where all nodes have as many ranks these are the rates as they were measured.
        """
        most_ranks = max(len(node.ranks) for node in self.nodes)
        gbits = []
        for pair in self.pairs:
            num_met = min(len(self.nodes[pair.first].ranks), len(self.nodes[pair.second].ranks))
            gbits.append(pair.gbit * most_ranks / num_met)
        return gbits

    def median_gbit(self) -> float:
        """Return the median over the nodes."""
        return statistics.median(self.of_nodes())

    def slow_nodes(self) -> list[int]:
        """Return the nodes below `SLOW_SHARE` of the median, the slowest first."""
        rates = self.of_nodes()
        slow = _far_below(rates) & _far_below(self._best(self._as_of_full_nodes()))
        return sorted(sorted(slow), key=lambda node: rates[node])

    def nodes_below(self, gbit: float) -> list[int]:
        """Return the nodes below a rate, the slowest first.

        Of a node with fewer ranks than others less is asked, by their share.
        """
        rates = self._best(self._as_of_full_nodes())
        below = [node for node, rate in enumerate(rates) if rate < gbit]
        return sorted(below, key=lambda node: rates[node])

    def median_pair_gbit(self) -> float:
        """Return the median over the pairs."""
        return statistics.median(pair.gbit for pair in self.pairs)

    def slow_pairs(self) -> list[PairRate]:
        """Return the pairs below `SLOW_SHARE` of the median pair between nodes that are not slow.

        The median is that of the pairs, most of which are slower than the best of a node where the
        fabric has fewer links between its switches than to the nodes.
        """
        slow = set(self.slow_nodes())
        far_below = _far_below([pair.gbit for pair in self.pairs])
        far_below &= _far_below(self._as_of_full_nodes())
        found = []
        for index in far_below:
            pair = self.pairs[index]
            if not slow & {pair.first, pair.second}:
                found.append(pair)
        return sorted(found, key=lambda pair: (pair.gbit, pair.first, pair.second))

    def describe(self) -> str:
        """Return one line for people."""
        rates = [pair.gbit for pair in self.pairs]
        return (
            f"{len(self.nodes)} nodes, each way between two of them: median "
            f"{_gbit(self.median_pair_gbit())}, lowest {_gbit(min(rates))}, highest "
            f"{_gbit(max(rates))} Gbit/s ({len(rates)} pairs in {self.seconds:.1f} s)"
        )

    def warnings(self) -> list[str]:
        """Return a line for the slow nodes and one for the slow pairs, as far as there are any."""
        lines = []
        nodes = self.slow_nodes()
        if nodes:
            lines.append(
                f"slow nodes, below half of the median of {_gbit(self.median_gbit())} Gbit/s: "
                f"{self.describe_nodes(nodes)}. Every step waits for them; leave them out of the "
                "job and tell the operators."
            )
        pairs = self.slow_pairs()
        if pairs:
            named = [self.describe_pair(pair) for pair in pairs[:MOST_NAMED]]
            lines.append(
                f"slow pairs of nodes, below half of their median of "
                f"{_gbit(self.median_pair_gbit())} Gbit/s: "
                f"{_listed(named, len(pairs))}"
            )
        return lines

    def describe_nodes(self, nodes: Sequence[int]) -> str:
        """Return nodes with their rates for people."""
        rates = self.of_nodes()
        named = []
        for node in nodes[:MOST_NAMED]:
            named.append(f"{self.nodes[node].name} ({_gbit(rates[node])} Gbit/s)")
        return _listed(named, len(nodes))

    def describe_pair(self, pair: PairRate) -> str:
        """Return the names of two nodes with their rate for people."""
        first = self.nodes[pair.first].name
        second = self.nodes[pair.second].name
        return f"{first} - {second} ({_gbit(pair.gbit)} Gbit/s)"

    def event(self) -> dict[str, Any]:
        """Return the event for metrics.jsonl, without its step."""
        by_node = []
        for node, gbit in zip(self.nodes, self.of_nodes(), strict=True):
            by_node.append({"node": node.name, "gbit": gbit})
        slow_pairs = []
        for pair in self.slow_pairs():
            names = [self.nodes[pair.first].name, self.nodes[pair.second].name]
            slow_pairs.append({"nodes": names, "gbit": pair.gbit})
        return {
            "event": "transport",
            "nodes": len(self.nodes),
            "pairs": len(self.pairs),
            "median_gbit": self.median_gbit(),
            "by_node": by_node,
            "slow_nodes": [self.nodes[node].name for node in self.slow_nodes()],
            "slow_pairs": slow_pairs,
            "seconds": self.seconds,
        }


def _far_below(rates: Sequence[float]) -> set[int]:
    """Return the places of the rates below `SLOW_SHARE` of their median."""
    limit = SLOW_SHARE * statistics.median(rates)
    return {place for place, rate in enumerate(rates) if rate < limit}


def _gbit(rate: float) -> str:
    """Return a rate with three digits at least."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _listed(named: list[str], total: int) -> str:
    """Return names in a row, and how many more there are."""
    more = f" and {total - len(named)} more" if total > len(named) else ""
    return ", ".join(named) + more
