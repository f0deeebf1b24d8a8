"""The optimizer of a run, and the memory of the state that is offloaded to NVMe."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from cpt.config import RunConfig, TrainSection
from cpt.deepspeed_adapter.experts import separate_experts
from cpt.deepspeed_adapter.offload import file_bytes, nvme_paths
from cpt.deepspeed_adapter.partition import full_local_shape
from cpt.model.experts.router_watch import router_parameters
from cpt.model.linear_maps import linear_maps
from cpt.parallel.agreement import together
from cpt.parallel.topology import Topology
from cpt.storage.file_memory import FileMemory
from cpt.storage.state_bytes import MOMENTS, MOMENTS_KEY, MomentForm
from cpt.training.muon import MatrixOptimizer, muon_group
from cpt.training.narrow_adamw import NarrowAdamW

log = logging.getLogger("cpt.training")

DECAYED_GROUP = "decay"
"""Name of the group of the matrices."""
ROUTER_GROUPS = ("routers", "routers_no_decay")
"""Names of the groups of the routers, if they are separate so that their rate can be 0."""


def parameter_groups(
    model: nn.Module, weight_decay: float, *, separate_routers: bool = False, muon: bool = False
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups.

    Matrices decay; biases, norms and sinks do not. Frozen parameters are in no group. gpt-oss
    stores an expert bias as a matrix (one row per expert), so names decide, not the number of
    dimensions.

    Args:
        model: The model.
        weight_decay: Decay of matrices.
        separate_routers: Whether the routers are in groups of their own, whose names are in
            `ROUTER_GROUPS`.
        muon: Whether the matrices that Muon trains are in a group of their own.
    """
    orthogonalized: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept_of_routers: list[nn.Parameter] = []
    decayed_of_routers: list[nn.Parameter] = []
    routers = {id(parameter) for parameter in router_parameters(model).values()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if muon and linear_maps(name, full_local_shape(parameter)) is not None:
            orthogonalized.append(parameter)
            continue
        is_separate = separate_routers and id(parameter) in routers
        last = name.rsplit(".", 1)[-1]
        if last.endswith("bias") or last == "sinks" or "norm" in name:
            (kept_of_routers if is_separate else kept).append(parameter)
        else:
            (decayed_of_routers if is_separate else decayed).append(parameter)
    groups = [
        {"name": DECAYED_GROUP, "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": kept, "weight_decay": 0.0},
    ]
    if separate_routers:
        decay, no_decay = ROUTER_GROUPS
        groups.append({"name": decay, "params": decayed_of_routers, "weight_decay": weight_decay})
        groups.append({"name": no_decay, "params": kept_of_routers, "weight_decay": 0.0})
    if muon:
        groups.append(muon_group(orthogonalized, weight_decay))
    return groups


def form_in_group(group: str, form: MomentForm) -> MomentForm:
    """Return the form of the moments of a parameter group.

    Args:
        group: The name of the group, one of those of `parameter_groups`.
        form: `train.optimizer_state`. In blocks are the moments of matrices but the routers': what
            is small saves little, and a router decides for all that comes after it.
    """
    if form == "int8" and group != DECAYED_GROUP:
        return "fp32"
    return form


def create_optimizer(
    model: nn.Module,
    train: TrainSection,
    *,
    separate_routers: bool = False,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """Create the optimizer of the trained parameters.

    torch's own kernel of AdamW also serves offloaded state: on a host it is as fast as DeepSpeed's,
    and nothing has to be compiled.

    Args:
        model: The model.
        train: Its section.
        separate_routers: As `parameter_groups` takes it.
        device: The device that computes, wherever the state lies; None for the host.
    """
    form = train.optimizer_state
    uses_muon = train.optimizer == "muon"
    separate_routers = separate_routers or form == "int8"
    all_groups = parameter_groups(
        model, train.weight_decay, separate_routers=separate_routers, muon=uses_muon
    )
    betas = (train.beta1, train.beta2)
    if form != "fp32":
        for group in all_groups:
            group[MOMENTS_KEY] = dict.fromkeys(MOMENTS, form_in_group(group["name"], form))
        groups = separate_experts(all_groups)
        return NarrowAdamW(groups, lr=train.lr, betas=betas, eps=train.eps, seed=train.seed)
    groups = separate_experts(all_groups)
    adamw = torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)
    if not uses_muon:
        return adamw
    optimizer = MatrixOptimizer(adamw, train.muon, device or torch.device("cpu"))
    optimizer.hold_whole(dict(model.named_parameters()))
    return optimizer


def reserve_files(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, topology: Topology
) -> dict[str, FileMemory]:
    """Reserve this rank's files for the state that goes to NVMe, by key of the DeepSpeed JSON.

    Raises:
        StorageError: on all ranks, if one of them finds no room.
    """
    folders = nvme_paths(config.engine_json)
    if not folders:
        return {}
    sizes = file_bytes(model, optimizer.param_groups, config.engine_json)
    for name, size in sizes.items():
        folder = folders[name].resolve()
        log.info("%s: %.3f GB of each rank in files in %s", name, size / 1e9, folder)
    return together(
        topology.control_group,
        lambda: {name: FileMemory(folders[name], size) for name, size in sizes.items()},
    )
