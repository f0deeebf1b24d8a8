"""The marks by which DeepSpeed's engine knows expert layers and expert parameters.

Expert parallelism uses the engine's AutoEP support without patching it: the engine recognizes an
`AutoEPMoELayer` by its class and reads four marks on its expert parameters. If either is missing,
ZeRO-3 shards *different* experts over the whole world as if they were replicas, without an error.

Read in deepspeed 0.19.8: runtime/engine.py (`_configure_distributed_model`,
`_configure_zero_optimizer`), moe/utils.py, module_inject/auto_ep_layer.py.
"""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

ExpertLayerBase = AutoEPMoELayer
"""Base class of expert layers for the engine; subclasses must not call its constructor."""


def expert_group_name(ep_size: int) -> str:
    """Return the name under which DeepSpeed keeps the expert groups of this size."""
    return f"ep_size_{ep_size}"


def mark_expert(parameter: nn.Parameter, ep_size: int) -> None:
    """Mark a parameter for the engine as one that holds this rank's experts and is no replica."""
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]


def is_expert(parameter: nn.Parameter) -> bool:
    """Return whether `mark_expert` was applied to a parameter."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def separate_experts(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split optimizer groups so that none mixes experts with replicated parameters.

    Empty groups are dropped.
    """
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return [group for group in groups if group["params"]]
