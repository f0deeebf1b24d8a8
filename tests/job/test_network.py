"""A start on several nodes tells their rates, names a slow one, and refuses it where that is asked.

Four processes on this machine pretend to be four nodes; what the last one sends comes late.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import SlowNodeError
from cpt.job.ending import Ending
from cpt.job.network import RankView, problems
from cpt.parallel.node_rates import Node
from cpt.telemetry.run_end import read_failure
from tests.support.launcher import launch

WORLD_SIZE = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("network")
    worker = Path(__file__).with_name("network_worker.py")
    assert launch(worker, WORLD_SIZE, [str(out)]) == [0] * WORLD_SIZE
    found = []
    for rank in range(WORLD_SIZE):
        found.append(json.loads((out / f"rank-{rank}.json").read_text()))
    return found


def test_ranks_of_one_node_measure_nothing_and_say_nothing(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["together"] == {"event": None, "phase": "load", "phases": 0}
        assert rank["lines together"] == []


def test_rates_between_nodes_are_told_and_the_slow_node_is_named(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        event = rank["none"]["event"]
        names = [entry["node"] for entry in event["by_node"]]
        assert (event["nodes"], event["pairs"]) == (4, 6)
        # on a busy machine another one may be slow for a moment: the slowest comes first
        assert event["slow_nodes"][0] == names[-1] and names[-1].endswith("#4")
        assert event["by_node"][-1]["gbit"] < 0.05
        assert event == ranks[0]["none"]["event"]
        told, warned = rank["lines none"][:2]
        assert told.startswith("network: gloo over TCP; 4 nodes, each way between two of them: ")
        assert warned.startswith("slow nodes, below half of the median") and names[-1] in warned
        assert rank["none"]["phase"] == "load" and rank["none"]["phases"] == 2


def test_limit_refuses_the_slow_node_on_every_rank_with_70(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        refused = rank["some"]
        assert (refused["error"], refused["code"]) == ("SlowNodeError", 70)
        assert (refused["rank"], refused["node"]) == (WORLD_SIZE - 1, "batch-3")
        assert "#4 (" in refused["text"] and "network.min_node_gbit (0.05)" in refused["text"]


def test_limit_that_no_node_reaches_is_a_wrong_configuration(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        refused = rank["all"]
        assert (refused["error"], refused["code"]) == ("ConfigError", 78)
        assert "no node reaches another one" in refused["text"]


def test_problem_is_told_once_with_the_nodes_that_have_it() -> None:
    nodes = []
    places = []
    for index in range(3):
        name = f"n{index}"
        nodes.append(Node(name=name, host=name, ranks=(index,)))
        problem = "no libibverbs" if index else ""
        places.append(
            RankView(host=name, node=name, local_rank=0, transport="", network_problem=problem)
        )
    assert problems(nodes, places) == ["network: no libibverbs (n1, n2)"]


def test_network_of_a_single_node_is_no_problem_but_gpus_apart_are() -> None:
    node = Node(name="n", host="n", ranks=(0, 1))
    place = RankView(
        host="n",
        node="n",
        local_rank=0,
        transport="",
        network_problem="no verbs",
        gpu_problem="GPUs 0-1 ...",
    )
    assert problems([node], [place]) == ["network: GPUs 0-1 ... (n)"]


def test_slow_node_and_not_the_first_rank_is_what_last_failure_names(tmp_path: Path) -> None:
    """The job templates leave out the node that stands there."""
    topology: Any = SimpleNamespace(rank=0)
    ending = Ending(tmp_path, topology, observe=False)
    error = SlowNodeError("slow nodes: n7", rank=63, host="n7.cluster", node="n7")
    with pytest.raises(SlowNodeError), ending.recording():
        raise error
    kept = read_failure(tmp_path)
    assert kept is not None and kept.exit_code == 70 and kept.cause == "slow nodes: n7"
    assert (kept.rank, kept.host, kept.node) == (63, "n7.cluster", "n7")
