"""Who computes what: the ranks of a run, and the only place where process groups are created.

Ranks of one sequence-parallel group are consecutive, and so are those of one expert-parallel group:

    sp_rank = rank % sp_size    dp_rank = rank // sp_size    ep_rank = rank % ep_size

so that both exchanges stay inside a node whenever their size divides the ranks of a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from cpt.deepspeed_adapter import internals as deepspeed_internals
from cpt.parallel.place import Place
from cpt.parallel.traffic import Traffic

CONTROL_TIMEOUT = timedelta(hours=6)
"""All ranks wait here while rank 0 builds data, verifies a checkpoint or exports one."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Layout of a run and this rank's place in it."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks."""
    sp_size: int
    """Ranks that share one packed row."""
    ep_size: int
    """Ranks that share one set of experts."""
    device: torch.device
    """Where this rank computes."""
    sp_group: dist.ProcessGroup
    """Ranks of this rank's rows."""
    ep_group: dist.ProcessGroup
    """Ranks that together hold all experts."""
    control_group: dist.ProcessGroup
    """All ranks, over gloo: decisions and bookkeeping, never activations."""
    traffic: Traffic = field(default_factory=Traffic)
    """Bytes sent by this rank."""
    place: Place = field(default_factory=Place)
    """What this rank is doing."""

    @property
    def sp_rank(self) -> int:
        """Which part of a row this rank holds."""
        return self.rank % self.sp_size

    @property
    def dp_size(self) -> int:
        """Groups of ranks that work on different rows."""
        return self.world_size // self.sp_size

    @property
    def dp_rank(self) -> int:
        """Which rows this rank works on."""
        return self.rank // self.sp_size

    @property
    def ep_rank(self) -> int:
        """Which experts this rank holds."""
        return self.rank % self.ep_size


def create_topology(*, sp_size: int, ep_size: int, device: torch.device) -> Topology:
    """Create all groups of a run; every rank calls this once, after the process group exists.

    Args:
        sp_size: Sequence-parallel size; divides the world size (checked by the configuration).
        ep_size: Expert-parallel size; divides the world size.
        device: Where this rank computes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % sp_size == 0 and world_size % ep_size == 0, (world_size, sp_size, ep_size)
    sp_group = None
    for first in range(0, world_size, sp_size):  # every rank must take part in the creation of every group
        group = dist.new_group(list(range(first, first + sp_size)))
        sp_group = group if first <= rank < first + sp_size else sp_group
    assert sp_group is not None
    return Topology(
        rank=rank,
        world_size=world_size,
        sp_size=sp_size,
        ep_size=ep_size,
        device=device,
        sp_group=sp_group,
        ep_group=deepspeed_internals.create_expert_groups(ep_size),
        control_group=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
    )
