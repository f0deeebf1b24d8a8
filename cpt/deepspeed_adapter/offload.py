"""Offloaded state: gradients are held once, and state on NVMe lies in mapped files.

DeepSpeed takes state on NVMe for host memory, and that memory is a file
(cpt/storage/file_memory.py). Its own swapper holds such state in files of which it reads a group at
a time: no save, resume or gradient norm would see it.

Where the optimizer state of ZeRO-3 is on the host, DeepSpeed adds gradients up in one buffer and
copies them to another, which Adam reads. Here both are the same memory if they have the same dtype:
the copy rounds nothing then, and the next step overwrites the buffer before it reads it. A run may
also keep them on the device (gradient_places.py).

`offloaded_state` replaces methods of DeepSpeed while an engine is built. The sources of the
replaced methods are compared with those that were read before an engine is built
(`RELIED_ON` in cpt/deepspeed_adapter/version.py).

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/offload_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from cpt.config.offload_blocks import OFFLOADS
from cpt.deepspeed_adapter.gradient_places import (
    CopiesForUpdate,
    SumsOnHost,
    clip_only_if_needed,
    sum_on_device,
)
from cpt.storage.file_memory import FileMemory
from cpt.storage.state_bytes import (
    FP32_BYTES,
    gradient_place,
    host_gradient_bytes,
    moment_bytes,
    moments_of_group,
)


def nvme_paths(engine_json: dict[str, Any]) -> dict[str, Path]:
    """Return the folders for state on NVMe, by key of the JSON."""
    paths = {}
    for name in OFFLOADS:
        block = engine_json["zero_optimization"].get(name, {})
        if block.get("device") == "nvme":
            paths[name] = Path(block["nvme_path"])
    return paths


def file_bytes(
    model: nn.Module, groups: list[dict[str, Any]], engine_json: dict[str, Any]
) -> dict[str, int]:
    """Return the bytes of this rank's state that goes to NVMe, by key of the JSON.

    Args:
        model: The model; its parameters are partitioned already.
        groups: The parameter groups of the optimizer.
        engine_json: The DeepSpeed JSON, resolved.
    """
    gradient_bytes = host_gradient_bytes(engine_json)
    optimizer_bytes = 0
    for group in groups:
        forms = moments_of_group(group).values()
        trained: list[Any] = group["params"]
        for parameter in trained:
            numel = parameter.ds_tensor.numel()
            optimizer_bytes += (FP32_BYTES + gradient_bytes) * numel
            for form in forms:
                optimizer_bytes += moment_bytes(form, numel)
                # an odd number of exponents leaves a gap before a moment in fp32
                optimizer_bytes += FP32_BYTES if form == "int8" else 0
    parameters: list[Any] = list(model.parameters())
    weight_bytes = sum(parameter.ds_tensor.nbytes for parameter in parameters)
    sizes = {"offload_optimizer": optimizer_bytes, "offload_param": weight_bytes}
    return {name: sizes[name] for name in nvme_paths(engine_json)}


def on_host(engine_json: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON for DeepSpeed, in which state on NVMe is state on the host.

    The memory is not page-locked, which is DeepSpeed's default: torch never gives such memory back,
    even after files have taken its place. The place of gradients is this project's own key.
    """
    zero = dict(engine_json["zero_optimization"])
    for name in nvme_paths(engine_json):
        zero[name] = {"device": "cpu", "pin_memory": False}
    if "offload_optimizer" in zero:
        block = dict(zero["offload_optimizer"])
        block.pop("gradients", None)
        zero["offload_optimizer"] = block
    return {**engine_json, "zero_optimization": zero}


@contextmanager
def offloaded_state(engine_json: dict[str, Any], files: dict[str, FileMemory]) -> Iterator[None]:
    """Replace the methods of DeepSpeed's ZeRO-3 optimizer that allocate state on the host.

    An engine that is built inside the block takes its weights, master weights and their gradients
    from `files`, by key of the DeepSpeed JSON. They are never in other memory, not even while the
    engine is built, because they might not fit. `place_gradients` completes the work after the
    block, for optimizer state in files and in host memory alike.
    """
    replacements: dict[str, Any] = {}
    if "offload_param" in files:
        memory = files["offload_param"]
        replacements["_create_param_groups_fp16_flat_cpu_memory"] = partialmethod(
            _create_weights, memory=memory
        )
    if "offload_optimizer" in files:
        memory = files["offload_optimizer"]
        replacements["_create_fp32_partitions"] = partialmethod(_create_masters, memory=memory)
        replacements["initialize_optimizer_states"] = _leave_gradients_in_files
    elif offloads_optimizer(engine_json):
        replacements["initialize_optimizer_states"] = _leave_gradients
    if offloads_optimizer(engine_json) and gradient_place(engine_json) == "device":
        replacements["initialize_optimizer_states"] = _leave_gradients_on_device
    replaced = {name: getattr(DeepSpeedZeroOptimizer_Stage3, name) for name in replacements}
    try:
        for name, method in replacements.items():
            setattr(DeepSpeedZeroOptimizer_Stage3, name, method)
        yield
    finally:
        for name, method in replaced.items():
            setattr(DeepSpeedZeroOptimizer_Stage3, name, method)


def offloads_optimizer(engine_json: dict[str, Any]) -> bool:
    """Return whether ZeRO-3 keeps the optimizer state off the device."""
    zero = engine_json["zero_optimization"]
    return zero["stage"] == 3 and "offload_optimizer" in zero


def settle_gradients(
    engine: Any, engine_json: dict[str, Any], files: dict[str, FileMemory]
) -> None:
    """Put the gradients of an engine with offloaded state where the configuration says.

    Args:
        engine: The engine, which was built inside `offloaded_state`.
        engine_json: The DeepSpeed JSON, resolved.
        files: Memory of the state on NVMe, by key of the JSON.
    """
    place = gradient_place(engine_json)
    if place is None:
        return
    zero = engine.optimizer
    if engine_json["zero_optimization"]["stage"] != 3:
        if place == "host":
            SumsOnHost(zero)
        else:
            sum_on_device(zero)
        return
    if place == "host":
        place_gradients(zero, files.get("offload_optimizer"))
        clip_only_if_needed(zero)
        return
    zero.device = OffloadDeviceEnum.cpu
    block = on_host(engine_json)["zero_optimization"]["offload_optimizer"]
    zero.offload_optimizer_pin_memory = block.get("pin_memory", True)
    zero.copies_for_update = CopiesForUpdate(zero, pin_memory=zero.offload_optimizer_pin_memory)


def _create_weights(zero: Any, memory: FileMemory) -> None:
    """Allocate the partitions of the weights (`_create_param_groups_fp16_flat_cpu_memory`)."""
    for group in zero.trainable_param_groups:
        numel = sum(parameter.partition_numel() for parameter in group["params"])
        zero.param_groups_fp16_flat_cpu_memory.append(memory.zeros(numel, zero.dtype))


def _create_masters(zero: Any, memory: FileMemory) -> None:
    """Allocate the master weights and give them their values (`_create_fp32_partitions`)."""
    halves = zero.fp16_partitioned_groups_flat
    for half, ids in zip(halves, zero.fp16_partitioned_groups_flat_id, strict=True):
        master: Any = memory.zeros(half.numel(), torch.float32)
        master.copy_(half)
        master.requires_grad_()
        master.ds_id = f"{ids[0]}_{ids[-1]}"
        zero.fp32_partitioned_groups_flat.append(master)
    num_masters = len(zero.fp32_partitioned_groups_flat)
    zero.subgroup_to_device = dict.fromkeys(range(num_masters), "cpu")
    for group in zero.optimizer.param_groups:
        group["params"] = []  # DeepSpeed fills them in before a step


def _leave_gradients(zero: Any) -> None:
    """Allocate no gradients for Adam (`initialize_optimizer_states`)."""


def _leave_gradients_in_files(zero: Any) -> None:
    """Allocate no gradients for Adam, nor memory for those that add up.

    Right after this method DeepSpeed allocates the buffer in which gradients add up, on
    `zero.device`. On the meta device that takes no memory, and `place_gradients` replaces the
    buffer.
    """
    zero.device = torch.device("meta")


def _leave_gradients_on_device(zero: Any) -> None:
    """Allocate no gradients for Adam, and let those that add up be on the device.

    Right after this method DeepSpeed allocates their buffer on `zero.device`, page-locked if the
    state is. `settle_gradients` sets both right.
    """
    zero.device = get_accelerator().current_device_name()
    zero.offload_optimizer_pin_memory = False


def place_gradients(zero: Any, memory: FileMemory | None) -> None:
    """Give Adam the gradients that add up over the accumulation steps.

    DeepSpeed keeps a view of their buffer for every parameter, in a dictionary whose name Python
    has mangled. The parameters of a group follow each other in it as in the group's master weights.

    Args:
        zero: The ZeRO-3 optimizer.
        memory: Where the buffer is to be; None if it is where DeepSpeed has put it.
    """
    buffer = zero.grad_partitions_flat_buffer
    if memory is not None:
        zero.device = OffloadDeviceEnum.cpu
        buffer = memory.zeros_like(buffer)
        zero.grad_partitions_flat_buffer = buffer
        views = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for key, view in views.items():
            views[key] = buffer.narrow(0, view.storage_offset(), view.numel())
    start = 0
    for master in zero.fp32_partitioned_groups_flat:
        if buffer.dtype == master.dtype:
            master.grad = buffer.narrow(0, start, master.numel())
        elif memory is not None:
            master.grad = memory.zeros_like(master)
        else:
            master.grad = torch.zeros_like(master, pin_memory=buffer.is_pinned())
        start += master.numel()
    assert start == buffer.numel(), f"{start} master weights and {buffer.numel()} gradients"


def move_frozen_weights(model: nn.Module, memory: FileMemory) -> None:
    """Move this rank's partitions of frozen parameters, which the optimizer does not know."""
    parameters: list[Any] = list(model.parameters())
    partitions = [p.ds_tensor for p in parameters if not p.requires_grad]
    for partition, copy in zip(partitions, memory.copies(partitions), strict=True):
        partition.data = copy
