"""The ranks of a run, and the groups in which they exchange.

Ranks of one sequence-parallel group are consecutive, and so are those of one expert-parallel group:

    sp_rank = rank % sp_size    dp_rank = rank // sp_size    ep_rank = rank % ep_size

so that both exchanges stay inside a node whenever their size divides the ranks of a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cpt.parallel.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The layout of a run, and this rank's place in it."""

    rank: int
    """Rank among all ranks of the run."""
    world_size: int
    """Number of ranks."""
    sp_size: int
    """Ranks that share one packed row."""
    ep_size: int
    """Ranks that share one set of experts."""
    device: torch.device
    """The device that this rank computes on."""
    sp_group: dist.ProcessGroup
    """Ranks that hold this rank's rows."""
    ep_group: dist.ProcessGroup
    """Ranks that together hold all experts."""
    control_group: dist.ProcessGroup
    """All ranks, over gloo: decisions and bookkeeping, never activations."""
    traffic: Traffic = field(default_factory=Traffic)
    """The counter of the bytes that this rank sends."""

    @property
    def sp_rank(self) -> int:
        """Index of the part of a row that this rank holds."""
        return self.rank % self.sp_size

    @property
    def dp_size(self) -> int:
        """Number of groups of ranks that work on different rows."""
        return self.world_size // self.sp_size

    @property
    def dp_rank(self) -> int:
        """Index of the group of rows that this rank works on."""
        return self.rank // self.sp_size

    @property
    def ep_rank(self) -> int:
        """Index of the slice of experts that this rank holds."""
        return self.rank % self.ep_size
