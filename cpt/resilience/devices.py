"""The device that a rank computes on, from its place in the job."""

from __future__ import annotations

import os

import torch

from cpt.errors import ConfigError
from cpt.resilience.environment import LaunchEnvironment
from data_pipeline.engine.local import available_cores


def this_device(environment: LaunchEnvironment, threads: int | None = None) -> torch.device:
    """Return the device of this rank; the ranks of a node share its cores.

    On a GPU, too, a host computes: updates of offloaded state. Left alone, torch would take all
    cores in each rank.

    Args:
        environment: The place of this rank.
        threads: Threads of this rank; None divides the cores that the job may use by the ranks of
            the node.

    Raises:
        ConfigError: the node shows fewer GPUs than it has ranks.
    """
    torch.set_num_threads(threads or _cores_of_rank(environment.local_world_size))
    if torch.cuda.is_available():
        check_gpu_count(torch.cuda.device_count(), environment)
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _cores_of_rank(local_world_size: int) -> int:
    """Return the cores of one rank.

    A rank may use all cores of its job, which can be a part of the node, or is bound to cores of
    its own, which then are no more than an even part of the node.
    """
    cores = available_cores()
    if cores > (os.cpu_count() or 1) // local_world_size:
        cores //= local_world_size
    return max(1, cores)


def memory_of_gpu(local_rank: int) -> tuple[str, int] | None:
    """Return the name of a rank's GPU and its memory in bytes; None if it has none."""
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(local_rank)
    return str(properties.name), int(properties.total_memory)


def check_gpu_count(num_gpus: int, environment: LaunchEnvironment) -> None:
    """Refuse more ranks on a node than the GPUs that CUDA shows them.

    Raises:
        ConfigError: with both numbers and the GPUs that CUDA_VISIBLE_DEVICES names.
    """
    if environment.local_rank < num_gpus:
        return
    named = "is not set"
    if environment.gpu_ids is not None:
        named = f"is {','.join(environment.gpu_ids)!r}"
    raise ConfigError(
        f"CUDA shows {num_gpus} GPUs, but rank {environment.rank} has LOCAL_RANK "
        f"{environment.local_rank}; CUDA_VISIBLE_DEVICES {named}. Start one rank for each GPU "
        "(deepspeed --num_gpus N), or name more GPUs."
    )
