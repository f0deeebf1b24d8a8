"""The process groups of a run: DeepSpeed's world, its expert groups, and our own.

DeepSpeed is never told of sequence parallelism: to the engine every rank is a data-parallel rank.

Read in deepspeed 0.19.8: utils/groups.py.
"""

from __future__ import annotations

import errno
import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from cpt.deepspeed_adapter.experts import expert_group_name
from cpt.errors import ConfigError
from cpt.parallel.rendezvous import init_method
from cpt.parallel.topology import Topology

CONTROL_TIMEOUT = timedelta(hours=6)
"""All ranks wait here while rank 0 builds data, verifies a checkpoint or exports one."""


def init_distributed(device: torch.device) -> None:
    """Join the process group that the launcher prepared.

    On CPU, DeepSpeed would compile a shared-memory all-reduce at first use. That takes most of a
    minute and leaves its buffers in /dev/shm when a rank is killed. The operation is declared
    incompatible, so that gloo does the work.

    Raises:
        ConfigError: the port of the launcher is in use.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            verbose=False,
            init_method=init_method(),
        )
    except (dist.DistNetworkError, OSError) as error:
        is_taken = "EADDRINUSE" in str(error) or getattr(error, "errno", 0) == errno.EADDRINUSE
        if not is_taken:
            raise
        port = os.environ.get("MASTER_PORT")
        raise ConfigError(
            f"port {port} is in use by another process. Give another: deepspeed --master_port N ..."
        ) from error


def create_expert_groups(ep_size: int) -> dist.ProcessGroup:
    """Create the expert-parallel and expert-data-parallel groups once; every rank must call this.

    Returns:
        This rank's expert-parallel group: `ep_size` consecutive ranks.
    """
    groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size, mp_size=1, pp_size=1)
    return groups._get_expert_parallel_group(expert_group_name(ep_size))


def create_control_group() -> dist.ProcessGroup:
    """Create a group of all ranks over gloo; every rank must call this."""
    return dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


def create_topology(*, sp_size: int, ep_size: int, device: torch.device) -> Topology:
    """Create all groups of a run; every rank calls this once, after `init_distributed`.

    Args:
        sp_size: Sequence-parallel size; divides the world size (checked by the configuration).
        ep_size: Expert-parallel size; divides the world size.
        device: The device on which this rank computes.
    """
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    assert world_size % sp_size == 0 and world_size % ep_size == 0, (world_size, sp_size, ep_size)
    sp_group = None
    # Every rank must take part in the creation of every group.
    for first in range(0, world_size, sp_size):
        group = dist.new_group(list(range(first, first + sp_size)))
        if first <= rank < first + sp_size:
            sp_group = group
    assert sp_group is not None
    return Topology(
        rank=rank,
        world_size=world_size,
        sp_size=sp_size,
        ep_size=ep_size,
        device=device,
        sp_group=sp_group,
        ep_group=create_expert_groups(ep_size),
        control_group=create_control_group(),
    )
