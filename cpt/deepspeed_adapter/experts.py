"""The marks by which DeepSpeed's engine knows expert layers and expert parameters.

Expert parallelism uses the engine's AutoEP support without patching it: the engine recognizes an
`AutoEPMoELayer` by its class and reads four marks on its expert parameters. If either is missing,
ZeRO-3 shards *different* experts over the whole world as if they were replicas, without an error.

ZeRO 1 and 2 refuse a model with expert layers of which no expert is trained, as with adapters of
attention alone. `experts_may_be_frozen` replaces the method that does; its source is compared with
the one that was read before an engine is built (`RELIED_ON` in cpt/deepspeed_adapter/version.py).

Read in deepspeed 0.19.8: runtime/engine.py (`_configure_distributed_model`,
`_configure_zero_optimizer`), runtime/zero/stage_1_and_2.py (`_configure_moe_settings`),
moe/utils.py, module_inject/auto_ep_layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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


@contextmanager
def experts_may_be_frozen(model: nn.Module) -> Iterator[None]:
    """Let an engine with ZeRO 1 or 2 be built inside the block though no expert is trained.

    All parameter groups are of replicated parameters then, as in a model without expert layers.
    """
    if any(is_expert(parameter) and parameter.requires_grad for parameter in model.parameters()):
        yield
        return

    def no_group_is_of_experts(optimizer: Any) -> None:
        optimizer.is_moe_param_group = [False] * len(optimizer.optimizer.param_groups)

    original = DeepSpeedZeroOptimizer._configure_moe_settings
    DeepSpeedZeroOptimizer._configure_moe_settings = no_group_is_of_experts
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer._configure_moe_settings = original
