"""Check the DeepSpeed JSON on its own: known keys, refused keys, and impossible values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cpt.config.engine_values import value_problems
from cpt.config.offload_blocks import OFFLOADS, offload_problems
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
"""Top-level keys that this project accepts; DeepSpeed itself would ignore a misspelled one."""

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
"""Keys under zero_optimization that are known to train and save correctly."""
REFUSED_ZERO_KEYS = {
    "round_robin_gradients": (
        "DeepSpeed 0.19.8 then reports wrong offsets, and a checkpoint would mix up tensors; "
        "remove it."
    ),
    "zero_hpz_partition_size": (
        "DeepSpeed's expert layers (AutoEP) refuse a second copy of the weights on each node "
        "(hpZ); remove it."
    ),
    "zero_quantized_gradients": (
        "DeepSpeed's expert layers (AutoEP) refuse quantized gradients; remove it."
    ),
    "zero_quantized_weights": (
        "it would round the weights that every step computes with; remove it."
    ),
    "zero_quantized_nontrainable_weights": (
        "it would round the frozen weights that every step computes with; remove it."
    ),
    "zenflow": (
        "it updates before the ranks know the norm, rounds master weights, and takes experts for "
        "matrices; remove it."
    ),
    "cpu_offload": (
        'it is the old word for offload_optimizer; write "offload_optimizer": {"device": "cpu"}.'
    ),
    "cpu_offload_param": (
        'it is the old word for offload_param; write "offload_param": {"device": "cpu"}.'
    ),
}
"""Keys under zero_optimization that DeepSpeed knows and this project refuses, and why."""
BLOCKS = (
    "bf16",
    "expert_parallel",
    "optimizer",
    "data_types",
    "aio",
    "comms_logger",
    "flops_profiler",
    "torch_autocast",
    "compile",
)
"""Keys of the DeepSpeed JSON whose value is a mapping."""
WHOLE_NUMBERS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "sequence_parallel_size",
)
"""Top-level keys whose value is `auto` or a whole number."""
REFUSED_KEYS = {
    "fp16": "gpt-oss overflows in fp16; use bf16 (train.dtype in the run YAML).",
    "scheduler": "the learning rate follows train.schedule in the run YAML; remove it.",
    "activation_checkpointing": "set model.activation_checkpointing in the run YAML; remove it.",
    "checkpoint": "the section checkpoint of the run YAML has the settings; remove it.",
    "tensorboard": "set telemetry.tensorboard in the run YAML; remove it.",
    "wandb": "set telemetry.wandb in the run YAML; remove it.",
    "tensor_parallel": "tensor parallelism is not supported; use expert and sequence parallelism.",
    "pipeline": "pipeline parallelism is not supported.",
    "data_parallel_size": "it follows from the world size; remove it.",
}


def json_problems(file: Located) -> list[str]:
    """Return everything that is wrong with a DeepSpeed JSON, whatever the run YAML says."""
    if not isinstance(file.value, dict):
        return [f"{file.source}: must be a JSON object."]
    return [
        *_unknown_or_refused_keys(file),
        *_malformed_numbers(file),
        *_malformed_blocks(file, file.value, (), BLOCKS),
        *_zero_problems(file),
        *_unsafe_values(file),
        *value_problems(file),
        *_expert_parallel_problems(file),
    ]


def _unknown_or_refused_keys(file: Located) -> list[str]:
    problems = []
    for key, value in file.value.items():
        switched_off = isinstance(value, dict) and value.get("enabled") is False
        if key in REFUSED_KEYS:
            if not switched_off:
                problems.append(f"{file.where((key,))}: {REFUSED_KEYS[key]}")
        elif key not in KNOWN_KEYS:
            problems.append(f"{file.where((key,))} is not a known key.{nearest(key, KNOWN_KEYS)}")
    return problems


def _malformed_numbers(file: Located) -> list[str]:
    problems = []
    for key in WHOLE_NUMBERS:
        value = file.value.get(key, "auto")
        is_whole = type(value) is int and value >= 1
        if value != "auto" and not is_whole:
            problems.append(
                f"{file.where((key,))} is {value!r}, must be 'auto' or a whole number >= 1."
            )
    clipping = file.value.get("gradient_clipping", "auto")
    is_number = isinstance(clipping, (int, float)) and not isinstance(clipping, bool)
    if clipping != "auto" and not (is_number and clipping >= 0):
        where = file.where(("gradient_clipping",))
        problems.append(f"{where} is {clipping!r}, must be 'auto' or a number >= 0.")
    return problems


def _zero_problems(file: Located) -> list[str]:
    """Return what is wrong with the block `zero_optimization`."""
    zero = file.value.get("zero_optimization")
    where = file.where(("zero_optimization",))
    wrong_stage = f"{where}.stage must be 1, 2 or 3 (optimizer state is sharded)."
    if not isinstance(zero, dict):
        return [wrong_stage]
    problems = []
    if zero.get("stage") not in (1, 2, 3):
        problems.append(wrong_stage)
    problems += _malformed_blocks(file, zero, ("zero_optimization",), OFFLOADS)
    for key in zero:
        if key in REFUSED_ZERO_KEYS:
            problems.append(
                f"{file.where(('zero_optimization', key))} is refused: {REFUSED_ZERO_KEYS[key]}"
            )
        elif key not in KNOWN_ZERO_KEYS:
            problems.append(
                f"{file.where(('zero_optimization', key))} is not a key that this project runs "
                f"with.{nearest(key, KNOWN_ZERO_KEYS)}"
            )
    return problems + offload_problems(file, zero)


def _unsafe_values(file: Located) -> list[str]:
    """Return values that DeepSpeed accepts and that would spoil a run without a word."""
    problems = []
    cpu_optimizer = file.value.get("zero_force_ds_cpu_optimizer", False)
    if cpu_optimizer is not False:
        problems.append(
            f"{file.where(('zero_force_ds_cpu_optimizer',))} is {json.dumps(cpu_optimizer)}, but "
            "torch's fused AdamW updates offloaded state too; remove it."
        )
    bf16 = _block(file, "bf16")
    overflow_check = bf16.get("check_grad_overflow", True)
    if overflow_check is not True:
        problems.append(
            f"{file.where(('bf16', 'check_grad_overflow'))} is {json.dumps(overflow_check)}: "
            "updates that are not finite would reach the weights; remove it."
        )
    problems += _malformed_blocks(file, _block(file, "optimizer"), ("optimizer",), ("params",))
    if "buffer_dtype" in _block(file, "data_types"):
        problems.append(
            f"{file.where(('data_types', 'buffer_dtype'))} would round the rotary frequencies, "
            "which must stay fp32; remove it."
        )
    return problems


def _expert_parallel_problems(file: Located) -> list[str]:
    block = file.value.get("expert_parallel", {})
    if not isinstance(block, dict):
        return []  # told with the other malformed blocks
    reader = Reader(file)
    reader.read(ExpertParallelJson, block, ("expert_parallel",))
    return reader.problems


def _block(file: Located, name: str) -> dict[str, Any]:
    """Return a block of the JSON; an empty one if it is missing or malformed."""
    value = file.value.get(name)
    return value if isinstance(value, dict) else {}


def _malformed_blocks(
    file: Located, block: dict[str, Any], path: KeyPath, names: Iterable[str]
) -> list[str]:
    """Return the blocks that are present and are not a mapping."""
    problems = []
    for name in names:
        if name in block and not isinstance(block[name], dict):
            where = file.where((*path, name))
            problems.append(f"{where} is {json.dumps(block[name])}, must be a mapping.")
    return problems
