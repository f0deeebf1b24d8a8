"""State on NVMe: to DeepSpeed it is host memory, and that memory is a file
(cpt/storage/file_memory.py).

DeepSpeed's own swapper holds such state in files of which it reads a group at a time: no save,
resume or gradient norm would see it.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/offload_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from cpt.config.engine_json import OFFLOADS
from cpt.deepspeed_adapter.shards import MOMENTS
from cpt.storage.file_memory import FileMemory

HOST_STATE_BYTES = 4 * (1 + len(MOMENTS) + 2)
"""Per trained parameter, fp32: master weight, moments, and the gradient twice: as it adds up and as
Adam reads it.
"""


def nvme_paths(engine_json: dict[str, Any]) -> dict[str, Path]:
    """The folders for state on NVMe, by key of the JSON."""
    blocks = {name: engine_json["zero_optimization"].get(name, {}) for name in OFFLOADS}
    return {
        name: Path(block["nvme_path"])
        for name, block in blocks.items()
        if block.get("device") == "nvme"
    }


def file_bytes(model: nn.Module, engine_json: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's state that goes to NVMe, by key of the JSON; the model's parameters are
    partitioned.
    """
    parameters: list[Any] = list(model.parameters())
    sizes = {
        "offload_optimizer": sum(
            HOST_STATE_BYTES * p.ds_tensor.numel() for p in parameters if p.requires_grad
        ),
        "offload_param": sum(p.ds_tensor.nbytes for p in parameters),
    }
    return {name: sizes[name] for name in nvme_paths(engine_json)}


def on_host(engine_json: dict[str, Any]) -> dict[str, Any]:
    """The JSON for DeepSpeed, to which state on NVMe is state on the host.

    Not page-locked, which is DeepSpeed's default: torch keeps such memory for good, also when files
    take its place.
    """
    on_host = {name: {"device": "cpu", "pin_memory": False} for name in nvme_paths(engine_json)}
    return {**engine_json, "zero_optimization": {**engine_json["zero_optimization"], **on_host}}


@contextmanager
def state_in_files(files: dict[str, FileMemory]) -> Iterator[None]:
    """Let an engine that is built meanwhile take weights, masters and their gradients from files.

    They are never in other memory, not even while the engine is built: they might not fit.
    """
    cls, ours = DeepSpeedZeroOptimizer_Stage3, {}

    def create_weights(zero: Any) -> None:
        for group in zero.trainable_param_groups:
            numel = sum(parameter.partition_numel() for parameter in group["params"])
            zero.param_groups_fp16_flat_cpu_memory.append(
                files["offload_param"].zeros(numel, zero.dtype)
            )

    def create_masters(zero: Any) -> None:
        for half, ids in zip(
            zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups_flat_id, strict=True
        ):
            master: Any = (
                files["offload_optimizer"]
                .zeros(half.numel(), torch.float32)
                .copy_(half)
                .requires_grad_()
            )
            master.ds_id = f"{ids[0]}_{ids[-1]}"
            zero.fp32_partitioned_groups_flat.append(master)
        zero.subgroup_to_device = dict.fromkeys(
            range(len(zero.fp32_partitioned_groups_flat)), "cpu"
        )
        for group in zero.optimizer.param_groups:
            group["params"] = []  # DeepSpeed fills them in before a step

    def create_gradients(zero: Any) -> None:
        for master in zero.fp32_partitioned_groups_flat:
            master.grad = files["offload_optimizer"].zeros_like(master)
        zero.device = torch.device(
            "meta"
        )  # where DeepSpeed makes its buffer next, which `place_gradients` replaces

    if "offload_param" in files:
        ours["_create_param_groups_fp16_flat_cpu_memory"] = create_weights
    if "offload_optimizer" in files:
        ours |= {
            "_create_fp32_partitions": create_masters,
            "initialize_optimizer_states": create_gradients,
        }
    theirs = {name: getattr(cls, name) for name in ours}
    try:
        for name, method in ours.items():
            setattr(cls, name, method)
        yield
    finally:
        for name, method in theirs.items():
            setattr(cls, name, method)


def place_gradients(zero: Any, memory: FileMemory) -> None:
    """The buffer in which gradients add up over the accumulation steps."""
    zero.device = OffloadDeviceEnum.cpu
    zero.grad_partitions_flat_buffer = memory.zeros_like(zero.grad_partitions_flat_buffer)
    views = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for key, view in views.items():
        views[key] = zero.grad_partitions_flat_buffer.narrow(0, view.storage_offset(), view.numel())


def move_frozen_weights(model: nn.Module, memory: FileMemory) -> None:
    """This rank's partitions of frozen parameters, which the optimizer does not know."""
    parameters: list[Any] = [
        parameter for parameter in model.parameters() if not parameter.requires_grad
    ]
    partitions = [parameter.ds_tensor for parameter in parameters]
    for partition, copy in zip(partitions, memory.copies(partitions), strict=True):
        partition.data = copy
