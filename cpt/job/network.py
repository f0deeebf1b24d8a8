"""The look at the network with which a run of several ranks starts: tell it, or refuse it.

Every rank judges the same gathered facts, so all of them go on or all raise the same error.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cpt.errors import ConfigError, SlowNodeError
from cpt.job.context import RunContext
from cpt.parallel.agreement import gather_json
from cpt.parallel.link_probe import measure
from cpt.parallel.node_rates import MOST_NAMED, Node, NodeRates, nodes_of
from cpt.parallel.transport import gpus_apart, nccl_version, read_transport
from cpt.resilience.environment import node_name

log = logging.getLogger("cpt.job.network")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankView:
    """One rank's node and what the rank sees there."""

    host: str
    """Host name."""
    node: str
    """Name of the node in the batch system."""
    local_rank: int
    """Rank within the node."""
    transport: str
    """Links between nodes, for people."""
    network_problem: str = ""
    """Why NCCL cannot use a link that is there; empty if it can."""
    gpu_problem: str = ""
    """Which GPUs of the node cannot reach each other; empty if all can."""


def look_at_network(context: RunContext, local_rank: int) -> dict[str, Any] | None:
    """Tell what connects the nodes of a run and how fast, and warn of what is slow.

    A run on one node tells nothing, unless its GPUs cannot reach each other.

    Args:
        context: The start of the run.
        local_rank: Rank within the node.

    Returns:
        The event for metrics.jsonl, without its step; None if nothing was measured.

    Raises:
        SlowNodeError: on all ranks: some nodes are slower than `network.min_node_gbit`.
        ConfigError: on all ranks: all nodes are.
    """
    topology = context.topology
    if topology.world_size == 1:
        return None
    here = asdict(view_here(topology.device, local_rank))
    views = [RankView(**fact) for fact in gather_json(here, topology.control_group)]
    nodes = nodes_of([(view.host, view.local_rank) for view in views])
    first_views = [views[node.ranks[0]] for node in nodes]
    for line in problems(nodes, first_views):
        log.warning("%s", line)
    settings = context.config.network
    if len(nodes) == 1 or not settings.measure:
        return None
    context.clock.enter("network", 0)
    rates = measure(nodes, topology)
    context.clock.enter("load", 0)
    transports = list(dict.fromkeys(view.transport for view in first_views))
    log.info("network: %s; %s", " / ".join(transports), rates.describe())
    for line in rates.warnings():
        log.warning("%s", line)
    refuse_slow(rates, settings.min_node_gbit, [view.node for view in first_views])
    return {**rates.event(), "transport": transports}


def view_here(device: torch.device, local_rank: int) -> RankView:
    """Return what this rank knows of its node."""
    host = socket.gethostname()
    if device.type != "cuda":
        return RankView(
            host=host, node=node_name(), local_rank=local_rank, transport="gloo over TCP"
        )
    transport = read_transport()
    gpu_problem = ""
    apart = gpus_apart()
    if apart:
        pairs = ", ".join(f"{first}-{second}" for first, second in apart[:MOST_NAMED])
        gpu_problem = (
            f"GPUs {pairs} cannot reach each other's memory (no NVLink, no PCIe peer access), so "
            "NCCL sends between them through host memory. nvidia-smi topo -p2p r tells why"
        )
    return RankView(
        host=host,
        node=node_name(),
        local_rank=local_rank,
        transport=f"NCCL {nccl_version()}, {transport.describe()}",
        network_problem=transport.problem(),
        gpu_problem=gpu_problem,
    )


def problems(nodes: Sequence[Node], views: Sequence[RankView]) -> list[str]:
    """Return one line for each problem, with the nodes that have it.

    Args:
        nodes: The nodes of the run.
        views: What the first rank of each node sees.
    """
    names: dict[str, list[str]] = {}
    for node, view in zip(nodes, views, strict=True):
        found = [view.gpu_problem]
        if len(nodes) > 1:
            found.append(view.network_problem)
        for problem in found:
            if problem:
                names.setdefault(problem, []).append(node.name)
    lines = []
    for problem, having in names.items():
        where = ", ".join(having[:MOST_NAMED])
        if len(having) > MOST_NAMED:
            where += f" and {len(having) - MOST_NAMED} more"
        lines.append(f"network: {problem} ({where})")
    return lines


def refuse_slow(rates: NodeRates, min_node_gbit: float, batch_names: Sequence[str]) -> None:
    """Refuse nodes that no other node reaches at a rate in Gbit/s.

    Args:
        rates: The rates between nodes.
        min_node_gbit: The rate; 0 refuses nothing.
        batch_names: Names of the nodes in the batch system.

    Raises:
        SlowNodeError: some nodes are slower; the others would do without them.
        ConfigError: all nodes are: what they run on, or the limit, is wrong.
    """
    below = rates.nodes_below(min_node_gbit)
    if not below:
        return
    named = rates.describe_nodes(below)
    if len(below) < len(rates.nodes):
        slowest = rates.nodes[below[0]]
        raise SlowNodeError(
            f"slow nodes: {named}, below network.min_node_gbit ({min_node_gbit:g}). Start again "
            "without them (sbatch --exclude), or lower the limit.",
            rank=slowest.ranks[-1],
            host=slowest.host,
            node=batch_names[below[0]],
        )
    raise ConfigError(
        f"network.min_node_gbit is {min_node_gbit:g}, but no node reaches another one at this "
        f"rate: {named}. The log says above what NCCL can use between the nodes; if that is as it "
        "should be, lower the limit."
    )
