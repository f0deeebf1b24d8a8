"""Every node meets every other one once, and a slow node is told from its partners."""

from __future__ import annotations

import itertools

import pytest

from cpt.parallel.link_probe import find_meeting, summed
from cpt.parallel.node_rates import Node, NodeRates, PairRate, nodes_of, tournament
from cpt.telemetry.shown import scalars


def measured(num_nodes: int, slow: dict[frozenset[int], float], fast: float = 400.0) -> NodeRates:
    """Return the rates of all pairs: `fast`, but for pairs that contain one of the keys' sets."""
    pairs = []
    for first, second in itertools.combinations(range(num_nodes), 2):
        gbit = fast
        for members, rate in slow.items():
            if members <= {first, second}:
                gbit = min(gbit, rate)
        pairs.append(PairRate(first=first, second=second, gbit=gbit))
    nodes = []
    for index in range(num_nodes):
        nodes.append(Node(name=f"n{index}", host=f"n{index}", ranks=(index,)))
    return NodeRates(nodes=tuple(nodes), pairs=tuple(pairs), seconds=1.5)


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 64])
def test_every_node_meets_every_other_one_once(num_nodes: int) -> None:
    rounds = tournament(num_nodes)
    for pairs in rounds:
        busy = list(itertools.chain.from_iterable(pairs))
        assert len(busy) == len(set(busy)) >= num_nodes - 1
    met = sorted(itertools.chain.from_iterable(rounds))
    assert met == list(itertools.combinations(range(num_nodes), 2))
    assert len(rounds) == (num_nodes - 1 if num_nodes % 2 == 0 else num_nodes)


def test_ranks_of_a_host_are_a_node_in_whatever_order_the_launcher_lays_them_out() -> None:
    block = nodes_of([("a", 0), ("a", 1), ("b", 0), ("b", 1)])
    assert [(node.name, node.ranks) for node in block] == [("a", (0, 1)), ("b", (2, 3))]
    cyclic = nodes_of([("a", 0), ("b", 0), ("a", 1), ("b", 1)])
    assert [(node.name, node.ranks) for node in cyclic] == [("a", (0, 2)), ("b", (1, 3))]


def test_local_rank_that_comes_again_begins_another_node_on_the_same_host() -> None:
    nodes = nodes_of([("a", 0), ("a", 1), ("a", 0), ("a", 1)])
    assert [(node.name, node.ranks) for node in nodes] == [("a", (0, 1)), ("a#2", (2, 3))]
    assert {node.host for node in nodes} == {"a"}


def test_ranks_meet_those_in_their_own_place_and_those_in_excess_rest() -> None:
    nodes = nodes_of([("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1)])
    pairs = [(0, 1)]
    met = [find_meeting(pairs, nodes, rank) for rank in range(5)]
    assert met == [(0, 1, 2), None, (0, 1, 0), None, None]


def test_rate_of_two_nodes_is_the_sum_over_their_ranks() -> None:
    found = summed([[(0, 1, 100.0), (0, 2, 50.0)], [(0, 1, 90.0)], [], []])
    assert [(pair.first, pair.second, pair.gbit) for pair in found] == [(0, 1, 190.0), (0, 2, 50.0)]


def test_slow_node_is_named_and_its_partners_are_not() -> None:
    rates = measured(5, {frozenset({3}): 20.0})
    assert rates.slow_nodes() == [3] and rates.slow_pairs() == []
    assert rates.median_gbit() == 400
    told = rates.warnings()
    assert len(told) == 1
    assert "slow nodes, below half of the median of 400 Gbit/s: n3 (20 Gbit/s)." in told[0]
    assert "lowest 20, highest 400 Gbit/s (10 pairs in 1.5 s)" in rates.describe()


def test_slow_pair_of_sound_nodes_is_named_as_a_pair() -> None:
    rates = measured(5, {frozenset({1, 4}): 30.0})
    assert rates.slow_nodes() == []
    told = rates.warnings()
    assert len(told) == 1 and "slow pairs of nodes" in told[0] and "n1 - n4 (30 Gbit/s)" in told[0]


def test_fabric_that_is_thin_between_its_switches_has_no_slow_pairs() -> None:
    """Nodes 0 to 3 and 4 to 7 are on two switches with a third of the links between them."""
    across = {}
    for first, second in itertools.product(range(4), range(4, 8)):
        across[frozenset({first, second})] = 130.0
    assert measured(8, across).warnings() == []


def test_nodes_that_are_alike_are_not_warned_about() -> None:
    assert measured(4, {}).warnings() == []
    assert measured(4, {frozenset({2}): 210.0}).warnings() == []


def unequal(small_gbit: float, num_ranks: int = 2) -> NodeRates:
    """Return the rates of four nodes with 8 ranks at 50 Gbit/s each, and a smaller one."""
    nodes = []
    for index in range(5):
        size = 8 if index < 4 else num_ranks
        nodes.append(Node(name=f"n{index}", host=f"n{index}", ranks=tuple(range(size))))
    pairs = []
    for first, second in itertools.combinations(range(5), 2):
        gbit = small_gbit if second == 4 else 400.0
        pairs.append(PairRate(first=first, second=second, gbit=gbit))
    return NodeRates(nodes=tuple(nodes), pairs=tuple(pairs), seconds=1.5)


@pytest.mark.parametrize("gbit", [100.0, 400.0])
def test_node_with_fewer_ranks_is_sound_with_an_adapter_for_each_or_one_for_all(
    gbit: float,
) -> None:
    rates = unequal(gbit)
    assert rates.warnings() == [] and rates.nodes_below(300) == []
    assert rates.of_nodes()[4] == gbit


def test_node_with_fewer_ranks_that_is_slow_is_named() -> None:
    rates = unequal(20.0)
    assert rates.slow_nodes() == [4] and rates.nodes_below(300) == [4]
    assert "n4 (20 Gbit/s)" in rates.warnings()[0]


def test_two_nodes_cannot_be_told_apart() -> None:
    assert measured(2, {frozenset({1}): 1.0}).warnings() == []


def test_long_lists_are_cut_with_the_number_left_out() -> None:
    slow = {frozenset({index}): 10.0 + index for index in range(12)}
    told = measured(30, slow).warnings()[0]
    assert "n0 (10 Gbit/s)" in told and "n7 (17 Gbit/s) and 4 more." in told and "n8" not in told


def test_event_holds_the_rate_of_every_node_and_what_is_slow() -> None:
    event = measured(4, {frozenset({0}): 40.0}).event()
    assert event["event"] == "transport" and event["nodes"] == 4 and event["pairs"] == 6
    assert event["by_node"][:2] == [{"node": "n0", "gbit": 40.0}, {"node": "n1", "gbit": 400.0}]
    assert set(scalars(event)) == {
        "transport/nodes",
        "transport/pairs",
        "transport/median_gbit",
        "transport/seconds",
    }  # one curve for each of many nodes would bury the others
    assert event["slow_nodes"] == ["n0"] and event["slow_pairs"] == []
