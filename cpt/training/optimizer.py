"""AdamW of a run, and the memory of the state that is offloaded to NVMe."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from cpt.config import RunConfig, TrainSection
from cpt.deepspeed_adapter.experts import separate_experts
from cpt.deepspeed_adapter.offload import file_bytes, nvme_paths
from cpt.parallel.agreement import together
from cpt.parallel.topology import Topology
from cpt.storage.file_memory import FileMemory

log = logging.getLogger("cpt.training")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups.

    Matrices decay; biases, norms and sinks do not. Frozen parameters are in neither group. gpt-oss
    stores an expert bias as a matrix (one row per expert), so names decide, not the number of
    dimensions.
    """
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        if last.endswith("bias") or last == "sinks" or "norm" in name:
            kept.append(parameter)
        else:
            decayed.append(parameter)
    return [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": kept, "weight_decay": 0.0},
    ]


def create_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """Create AdamW for the trained parameters.

    torch's own kernel also serves offloaded state: on a host it is as fast as DeepSpeed's, and
    nothing has to be compiled.
    """
    groups = separate_experts(parameter_groups(model, train.weight_decay))
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)


def reserve_files(model: nn.Module, config: RunConfig, topology: Topology) -> dict[str, FileMemory]:
    """Reserve this rank's files for the state that goes to NVMe, by key of the DeepSpeed JSON.

    Raises:
        StorageError: on all ranks, if one of them finds no room.
    """
    folders = nvme_paths(config.engine_json)
    if not folders:
        return {}
    sizes = file_bytes(model, config.engine_json)
    for name, size in sizes.items():
        folder = folders[name].resolve()
        log.info("%s: %.3f GB of each rank in files in %s", name, size / 1e9, folder)
    return together(
        topology.control_group,
        lambda: {name: FileMemory(folders[name], size) for name, size in sizes.items()},
    )
