"""Bytes that the training state of one parameter takes, in memory and in files.

A trained parameter has an fp32 master weight and moments of the optimizer. Which moments, and in
which form, its parameter group says under the key `MOMENTS_KEY`; a group without it has Adam's two
in fp32. Files hold every moment in fp32, whatever its form in memory.

Forms of a moment
    fp32  4 bytes
    bf16  2 bytes
    int8  1 byte, and one for each block of `MOMENT_BLOCK` consecutive elements
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

MomentForm = Literal["fp32", "bf16", "int8"]
"""How a moment is held in memory; also the words of `train.optimizer_state`."""

FP32_BYTES = 4
BF16_BYTES = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments: the names under which torch holds them and files store them."""
MOMENTS_KEY = "moments"
"""Key of a parameter group whose value is a mapping from moment to form."""
MOMENT_BLOCK = 64
"""Consecutive elements of a parameter that share an exponent in the form int8."""
STORED_BYTES = (1 + len(MOMENTS)) * FP32_BYTES
"""Bytes of a trained parameter in a checkpoint, if it has both moments."""


def moments_of_group(group: Mapping[str, Any]) -> dict[str, MomentForm]:
    """Return which moments the parameters of an optimizer's group have, and in which form."""
    default: dict[str, MomentForm] = dict.fromkeys(MOMENTS, "fp32")
    forms: dict[str, MomentForm] = dict(group.get(MOMENTS_KEY, default))
    return forms


def moment_bytes(form: MomentForm, numel: int) -> int:
    """Return the bytes of one moment of so many elements, in memory."""
    if form == "fp32":
        return FP32_BYTES * numel
    if form == "bf16":
        return BF16_BYTES * numel
    return numel + numel // MOMENT_BLOCK


def optimizer_bytes(numel: int, form: MomentForm = "fp32", num_moments: int = 2) -> int:
    """Return the bytes of master weights and moments of trained parameters, in memory.

    Args:
        numel: Number of elements.
        form: Form of the moments.
        num_moments: 2 for AdamW; an optimizer with a momentum alone has 1.
    """
    return FP32_BYTES * numel + num_moments * moment_bytes(form, numel)


def gradient_place(engine_json: dict[str, Any]) -> Literal["host", "device"] | None:
    """Return where gradients add up if the optimizer state is offloaded; None if it is not.

    Args:
        engine_json: The DeepSpeed JSON, resolved.
    """
    block = engine_json["zero_optimization"].get("offload_optimizer")
    if block is None:
        return None
    place: Literal["host", "device"] = block.get("gradients", "host")
    return place


def host_gradient_bytes(engine_json: dict[str, Any]) -> int:
    """Return the bytes of a parameter's gradient on the host where the state is offloaded.

    Adam reads fp32. A gradient that adds up in fp32 is held once; under ZeRO-3 one that adds up in
    bf16 is held in both. Under ZeRO 2 the host has Adam's also if sums are on the device.

    Args:
        engine_json: The DeepSpeed JSON, resolved.
    """
    stage = engine_json["zero_optimization"]["stage"]
    if stage == 3 and gradient_place(engine_json) == "device":
        return 0
    if stage == 3 and _adds_up_in_bf16(engine_json):
        return FP32_BYTES + BF16_BYTES
    return FP32_BYTES


def device_gradient_bytes(engine_json: dict[str, Any]) -> int:
    """Return the bytes of a number in which ZeRO 2 or 3 adds gradients up on the device.

    Args:
        engine_json: The DeepSpeed JSON, resolved.
    """
    if gradient_place(engine_json) == "host":
        return 0
    if engine_json["zero_optimization"]["stage"] == 3 and _adds_up_in_bf16(engine_json):
        return BF16_BYTES
    return FP32_BYTES


def _adds_up_in_bf16(engine_json: dict[str, Any]) -> bool:
    return bool(engine_json.get("data_types", {}).get("grad_accum_dtype", "fp32") == "bf16")
