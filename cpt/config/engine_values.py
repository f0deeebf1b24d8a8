"""Check single values of the DeepSpeed JSON that DeepSpeed reads unchecked, or checks too late.

Blocks that DeepSpeed reads with a class of its own are judged by that class
(`cpt.deepspeed_adapter.json_values`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from data_pipeline.config.strict_yaml import KeyPath, Located, nearest

DTYPE_NAMES = ("bf16", "fp32")
_FP16_NAMES = ("fp16", "float16", "half", "torch.float16")
DTYPE_KEYS: tuple[KeyPath, ...] = (
    ("communication_data_type",),
    ("data_types", "grad_accum_dtype"),
    ("data_types", "param_dtype"),
)
"""Keys whose value is the name of a dtype; null leaves the choice to DeepSpeed."""
SWITCHES: tuple[KeyPath, ...] = (
    ("wall_clock_breakdown",),
    ("memory_breakdown",),
    ("dump_state",),
    ("disable_allgather",),
    ("zero_allow_untested_optimizer",),
    ("torch_autocast", "enabled"),
    ("flops_profiler", "enabled"),
    ("flops_profiler", "detailed"),
)
"""Keys whose value is true or false."""
COUNTS: tuple[KeyPath, ...] = (
    ("steps_per_print",),
    ("flops_profiler", "profile_step"),
    ("flops_profiler", "top_modules"),
)
"""Keys whose value is a whole number above 0."""
KEYS_OF_BLOCKS = {
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "flops_profiler": (
        "enabled",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
        "recompute_fwd_factor",
    ),
}
"""Known keys of the blocks that DeepSpeed reads key by key, passing over those it does not know."""
_NOT_SCALED = "ZeRO divides gradients by the number of ranks itself; remove it."
_MASTERS = "master weights are kept in fp32; remove it."
_MOMENTS = "train.optimizer_state says how moments are held; remove it."
ONLY_VALUE: dict[KeyPath, tuple[Any, str]] = {
    ("prescale_gradients",): (False, _NOT_SCALED),
    ("gradient_predivide_factor",): (1, _NOT_SCALED),
    ("bf16", "bf16_master_weights_and_grads"): (False, _MASTERS),
    ("bf16", "bf16_optimizer_states"): (False, _MOMENTS),
    ("aio", "use_gds"): (False, "state on NVMe is mapped into memory; remove it."),
}
"""Keys that only one value works with, and why."""
_ABSENT = object()


def value_problems(file: Located) -> list[str]:
    """Return what is wrong with single values of a DeepSpeed JSON, an object."""
    problems = [*_wrong_dtypes(file), *_wrong_autocast(file)]
    path: KeyPath = ("data_types", "keep_in_fp32_modules")
    patterns = _value_at(file, path)
    if patterns is not _ABSENT and patterns != "auto" and not _is_list_of_texts(patterns):
        problems.append(f"{_told(file, path, patterns)}, must be 'auto' or a list of patterns.")
    for path in SWITCHES:
        value = _value_at(file, path)
        if value is not _ABSENT and not isinstance(value, bool):
            problems.append(f"{_told(file, path, value)}, must be true or false.")
    for path in COUNTS:
        value = _value_at(file, path)
        if value is not _ABSENT and not (type(value) is int and 1 <= value < 2**63):
            problems.append(f"{_told(file, path, value)}, must be a whole number >= 1.")
    for path, (only, reason) in ONLY_VALUE.items():
        value = _value_at(file, path)
        is_only = value == only and isinstance(value, bool) == isinstance(only, bool)
        if value is not _ABSENT and not is_only:
            problems.append(f"{_told(file, path, value)}, but {reason}")
    return problems + _unknown_keys(file)


def dtype_problem(told: str, value: Any) -> str | None:
    """Return what is wrong with the name of a dtype; None if nothing is.

    Args:
        told: File, key and value, for the message.
        value: The name.
    """
    name = value.lower() if isinstance(value, str) else None
    if name in _FP16_NAMES:
        return f"{told}: gpt-oss overflows in fp16. Write one of {', '.join(DTYPE_NAMES)}."
    if value not in DTYPE_NAMES:
        return f"{told}, which is no dtype here. Write one of {', '.join(DTYPE_NAMES)}."
    return None


def _wrong_dtypes(file: Located) -> list[str]:
    problems = []
    for path in DTYPE_KEYS:
        value = _value_at(file, path)
        if value is _ABSENT or value is None:
            continue
        problem = dtype_problem(_told(file, path, value), value)
        if problem is not None:
            problems.append(problem)
    return problems


def _wrong_autocast(file: Located) -> list[str]:
    """Check `torch_autocast`, whose dtype on a GPU is fp16 unless it is given."""
    problems = []
    block = file.value.get("torch_autocast")
    if not isinstance(block, dict):
        return []
    value = block.get("dtype", _ABSENT)
    where = file.where(("torch_autocast", "dtype"))
    if value is not _ABSENT and value not in ("bf16", "bfloat16", "torch.bfloat16"):
        told = _told(file, ("torch_autocast", "dtype"), value)
        problems.append(f"{told}: gpt-oss computes in bf16 or without autocast. Write bf16.")
    elif value is _ABSENT and block.get("enabled") is True:
        problems.append(f"{where} is missing, and torch would take fp16. Write bf16.")
    names = block.get("lower_precision_safe_modules", [])
    if not _is_list_of_texts(names):
        path = ("torch_autocast", "lower_precision_safe_modules")
        problems.append(f"{_told(file, path, names)}, must be a list of class names.")
    return problems


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _unknown_keys(file: Located) -> list[str]:
    problems = []
    for block_name, known in KEYS_OF_BLOCKS.items():
        block = file.value.get(block_name)
        keys: Iterable[Any] = block if isinstance(block, dict) else ()
        for key in keys:
            if key not in known:
                where = file.where((block_name, key))
                problems.append(f"{where} is not a known key.{nearest(key, known)}")
    return problems


def _value_at(file: Located, path: KeyPath) -> Any:
    value = file.value
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _told(file: Located, path: KeyPath, value: Any) -> str:
    return f"{file.where(path)} is {json.dumps(value)}"
