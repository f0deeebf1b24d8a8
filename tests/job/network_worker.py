"""One rank of a run whose ranks pretend to be nodes of their own; the last one is slow."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from cpt.config.sections import NetworkSection
from cpt.errors import CptError, SlowNodeError
from cpt.job import network
from cpt.parallel import link_probe
from cpt.parallel.node_rates import Node, NodeRates
from cpt.resilience.phase import PhaseClock

SLOW_BYTES_PER_SECOND = 5e6
LIMIT_GBIT = {"some": 0.05, "all": 1e6, "none": 0.0}
"""Limits that one node, all nodes and no node is below."""


class _SlowProbe(link_probe._Probe):
    """A rank whose messages are late."""

    def _exchange(self, outgoing: torch.Tensor, incoming: torch.Tensor, peer: int) -> None:
        time.sleep(outgoing.numel() / SLOW_BYTES_PER_SECOND)
        super()._exchange(outgoing, incoming, peer)


def look(limit: str, local_rank: int) -> dict[str, Any]:
    """Return what a start of a run does with a limit."""
    settings = NetworkSection(min_node_gbit=LIMIT_GBIT[limit])
    topology = SimpleNamespace(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cpu"),
        control_group=dist.group.WORLD,
    )
    clock = PhaseClock()
    context: Any = SimpleNamespace(
        config=SimpleNamespace(network=settings), topology=topology, clock=clock
    )
    try:
        event = network.look_at_network(context, local_rank)
    except CptError as error:
        found = {"error": type(error).__name__, "code": error.exit_code, "text": str(error)}
        if isinstance(error, SlowNodeError):
            found |= {"rank": error.rank, "host": error.host, "node": error.node}
        return found
    return {"event": event, "phase": clock.now().phase, "phases": clock.now().count}


def main(out: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cpt.job.network").addHandler(handler)
    logging.getLogger("cpt.job.network").setLevel(logging.INFO)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ["SLURMD_NODENAME"] = f"batch-{rank}"
    found: dict[str, Any] = {"together": look("none", rank)}
    found["lines together"] = list(lines)
    link_probe.FIRST_BYTES = 2**18
    link_probe.LARGEST_BYTES = 2**22
    link_probe.MESSAGE_SECONDS = 0.02
    if rank == dist.get_world_size() - 1:
        link_probe._Probe = _SlowProbe  # type: ignore[misc]
    measured: list[NodeRates] = []

    def measure_once(nodes: list[Node], topology: Any) -> NodeRates:
        if not measured:
            measured.append(link_probe.measure(nodes, topology))
        return measured[0]

    network.measure = measure_once  # type: ignore[assignment]
    for limit in LIMIT_GBIT:
        lines.clear()
        found[limit] = look(limit, local_rank=0)
        found[f"lines {limit}"] = list(lines)
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
