"""The DeepSpeed JSON on its own: which keys are known, which are refused and why, which values
cannot be right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cpt.config.sections import ExpertParallelJson
from data_pipeline.config.strict_yaml import KeyPath, Located, Reader, nearest

OWN_KEYS = ("sequence_parallel_size", "expert_parallel")
KNOWN_KEYS = (
    *OWN_KEYS,
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "zero_optimization",
    "optimizer",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
    "torch_autocast",
    "compile",
    "disable_allgather",
    "seed",
)
"""Top-level keys of the DeepSpeed JSON that this project accepts: DeepSpeed itself ignores a
misspelt one.
"""

OFFLOADS = ("offload_optimizer", "offload_param")
OFFLOAD_DEVICES = ("none", "cpu", "nvme")
KNOWN_ZERO_KEYS = (
    "stage",
    *OFFLOADS,
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
)
"""Keys under zero_optimization that are known to train and save rightly.  Left out on purpose:
round_robin_gradients (DeepSpeed 0.19.8 then reports wrong offsets, and a checkpoint would mix up
tensors), hpZ, MiCS and quantised communication (refused by AutoEP)."""
BLOCKS = (
    "bf16",
    "expert_parallel",
    "optimizer",
    "data_types",
    "aio",
    "comms_logger",
    "flops_profiler",
)
"""Keys of the DeepSpeed JSON whose value is a mapping."""

REFUSED_KEYS = {
    "fp16": "gpt-oss overflows in fp16; use bf16 (train.dtype in the run YAML).",
    "scheduler": "the learning rate follows train.schedule in the run YAML; remove it.",
    "activation_checkpointing": "set model.activation_checkpointing in the run YAML; remove it.",
    "checkpoint": "checkpoints are this project's own (section checkpoint of the run YAML); remove it.",
    "tensorboard": "set telemetry.tensorboard in the run YAML; remove it.",
    "wandb": "set telemetry.wandb in the run YAML; remove it.",
    "tensor_parallel": "tensor parallelism is not supported; use expert and sequence parallelism.",
    "pipeline": "pipeline parallelism is not supported.",
    "data_parallel_size": "it follows from the world size; remove it.",
}


def json_problems(file: Located) -> list[str]:
    if not isinstance(file.value, dict):
        return [f"{file.source}: must be a JSON object."]
    problems = []
    for key, value in file.value.items():
        if key in REFUSED_KEYS and not (isinstance(value, dict) and value.get("enabled") is False):
            problems.append(f"{file.where((key,))}: {REFUSED_KEYS[key]}")
        elif key not in KNOWN_KEYS and key not in REFUSED_KEYS:
            problems.append(f"{file.where((key,))} is not a known key.{nearest(key, KNOWN_KEYS)}")
    numbers = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        OWN_KEYS[0],
    )
    for key in numbers:
        value = file.value.get(key, "auto")
        if value != "auto" and (type(value) is not int or value < 1):
            problems.append(
                f"{file.where((key,))} is {value!r}, must be 'auto' or a whole number >= 1."
            )
    clipping = file.value.get("gradient_clipping", "auto")
    if clipping != "auto" and (
        isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or clipping < 0
    ):
        problems.append(
            f"{file.where(('gradient_clipping',))} is {clipping!r}, must be 'auto' or a number >= 0."
        )
    zero = file.value.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        problems.append(
            f"{file.where(('zero_optimization',))}.stage must be 1, 2 or 3 (optimizer state is sharded)."
        )
    problems += _malformed_blocks(file, file.value, (), BLOCKS)
    if isinstance(zero, dict):
        problems += _malformed_blocks(file, zero, ("zero_optimization",), OFFLOADS)
        problems += [
            f"{file.where(('zero_optimization', key))} is not a key that this project runs with."
            f"{nearest(key, KNOWN_ZERO_KEYS)}"
            for key in zero
            if key not in KNOWN_ZERO_KEYS
        ]
        problems += _offload_problems(file, zero)
    if file.value.get("zero_force_ds_cpu_optimizer", False) is not False:
        problems.append(
            f"{file.where(('zero_force_ds_cpu_optimizer',))} is "
            f"{json.dumps(file.value['zero_force_ds_cpu_optimizer'])}, but torch's fused AdamW updates offloaded state "
            "too; remove it."
        )
    bf16 = file.value.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow", True) is not True:
        problems.append(
            f"{file.where(('bf16', 'check_grad_overflow'))} is {json.dumps(bf16['check_grad_overflow'])}: updates that "
            "are not finite would reach the weights; remove it."
        )
    if isinstance(file.value.get("optimizer"), dict):
        problems += _malformed_blocks(file, file.value["optimizer"], ("optimizer",), ("params",))
    if (
        isinstance(file.value.get("data_types"), dict)
        and "buffer_dtype" in file.value["data_types"]
    ):
        problems.append(
            f"{file.where(('data_types', 'buffer_dtype'))} would round the rotary frequencies, which must stay fp32; "
            "remove it."
        )
    reader = Reader(file)
    if isinstance(file.value.get("expert_parallel", {}), dict):
        reader.read(ExpertParallelJson, file.value.get("expert_parallel", {}), ("expert_parallel",))
    return problems + reader.problems


def _offload_problems(file: Located, zero: dict[str, Any]) -> list[str]:
    """What is wrong with the blocks that offload state."""
    problems, stage = [], zero.get("stage")
    blocks = {name: zero[name] for name in OFFLOADS if isinstance(zero.get(name), dict)}
    places = {name: block.get("device") for name, block in blocks.items()}
    for name, place in places.items():
        if place not in OFFLOAD_DEVICES:
            problems.append(
                f"{file.where(('zero_optimization', name, 'device'))} is {json.dumps(place)}, must be one of "
                f"{', '.join(OFFLOAD_DEVICES)}."
            )
        if stage in (1, 2) and (place == "nvme" or (name == "offload_param" and place == "cpu")):
            what = (
                "keeps weights whole on every GPU"
                if name == "offload_param"
                else "keeps no state in files"
            )
            problems.append(
                f"{file.where(('zero_optimization', name))} has device {place!r}, but DeepSpeed {what} in ZeRO stage "
                f"{stage}. Use stage 3, or remove the block."
            )
        if place == "nvme":
            problems += _nvme_problems(file, name, blocks[name])
    if "nvme" in places.values() and "aio" in file.value:
        problems.append(
            f"{file.where(('aio',))} has no effect: state on NVMe is mapped into memory. Remove it."
        )
    return problems


def _nvme_problems(file: Located, name: str, block: dict[str, Any]) -> list[str]:
    """What is wrong with one block for state on NVMe."""
    problems = []
    path = block.get("nvme_path")
    if not isinstance(path, str) or not path:
        where = file.where(("zero_optimization", name, "nvme_path"))
        problems.append(f"{where} is {json.dumps(path)}, must be a folder on a disk of each node.")
    problems += [
        f"{file.where(('zero_optimization', name, key))} has no effect on state on NVMe: the files are mapped into "
        "memory, and the kernel decides what of them is there. Remove it."
        for key in block
        if key not in ("device", "nvme_path")
    ]
    return problems


def _malformed_blocks(
    file: Located, block: dict[str, Any], path: KeyPath, names: Iterable[str]
) -> list[str]:
    """Blocks that are there but are no mapping."""
    return [
        f"{file.where((*path, name))} is {json.dumps(block[name])}, must be a mapping."
        for name in names
        if name in block and not isinstance(block[name], dict)
    ]
