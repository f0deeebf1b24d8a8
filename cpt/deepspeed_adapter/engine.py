"""The DeepSpeed engine of a run, and the check of the private code it relies on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import nn

from cpt.deepspeed_adapter.experts import experts_may_be_frozen
from cpt.deepspeed_adapter.offload import (
    move_frozen_weights,
    nvme_paths,
    offloaded_state,
    offloads_optimizer,
    on_host,
    settle_gradients,
)
from cpt.deepspeed_adapter.shards import create_optimizer_state
from cpt.deepspeed_adapter.state_reading import StateReading
from cpt.deepspeed_adapter.version import Feature, check_private_code
from cpt.storage.allocation import release_page_locked
from cpt.storage.file_memory import FileMemory
from cpt.storage.state_bytes import gradient_place


def check_internals(engine_json: dict[str, Any]) -> None:
    """Refuse a DeepSpeed whose private code differs where this configuration relies on it.

    Raises:
        ConfigError: a private function is missing or is not the one that was read.
    """
    features: list[Feature] = ["experts"]
    if engine_json["zero_optimization"]["stage"] == 3:
        features.append("ZeRO-3")
    else:
        features.append("ZeRO-1 or 2")
    paths = nvme_paths(engine_json)
    if offloads_optimizer(engine_json):
        features.append("offloaded optimizer")
    if "offload_optimizer" in paths:
        features.append("NVMe optimizer")
    if gradient_place(engine_json) is not None and not offloads_optimizer(engine_json):
        features.append("offloaded optimizer of ZeRO-1 or 2")
    if "offload_param" in paths:
        features.append("NVMe weights")
    check_private_code(features)


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine_json: dict[str, Any],
    files: dict[str, FileMemory],
) -> Any:
    """Build the engine.

    Args:
        model: The model; its parameters are partitioned already under ZeRO-3.
        optimizer: Updates the trained parameters.
        engine_json: The DeepSpeed JSON, resolved.
        files: The memory of the state that goes to NVMe, of the sizes that `file_bytes` returns.
    """
    # DeepSpeed's own clock makes the host wait for the device twice in every micro step.
    config = {**on_host(engine_json), "timers": {"throughput": {"enabled": False}}}
    is_stage3 = engine_json["zero_optimization"]["stage"] == 3
    frozen_experts = nullcontext() if is_stage3 else experts_may_be_frozen(model)
    with offloaded_state(engine_json, files), frozen_experts:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.state_reading = StateReading()
    settle_gradients(engine, engine_json, files)
    # DeepSpeed copies the partitions of weights, which are page-locked one by one, to flat buffers,
    # so a node would hold its weights twice until the end. Read in deepspeed 0.19.8:
    # partition_parameters.py, `_partition_param`; stage3.py,
    # `_create_param_groups_fp16_flat_cpu_memory` and `_move_to_flat_buffer`.
    release_page_locked()
    if "offload_optimizer" in files:
        create_optimizer_state(engine, files["offload_optimizer"].zeros)
    if "offload_param" in files:
        move_frozen_weights(model, files["offload_param"])
    return engine
