"""Bytes that the training state of one parameter takes, in memory and in files."""

from __future__ import annotations

from typing import Any

FP32_BYTES = 4
BF16_BYTES = 2
OPTIMIZER_BYTES = 3 * FP32_BYTES
"""fp32 master weight and two Adam moments; a checkpoint keeps the same of a trained parameter."""


def host_gradient_bytes(engine_json: dict[str, Any]) -> int:
    """Return the bytes of a parameter's gradient where the optimizer state is offloaded.

    Adam reads fp32. A gradient that adds up in fp32 is held once; under ZeRO-3 one that adds up in
    bf16 is held in both.

    Args:
        engine_json: The DeepSpeed JSON, resolved.
    """
    accumulation = engine_json.get("data_types", {}).get("grad_accum_dtype", "fp32")
    stage = engine_json["zero_optimization"]["stage"]
    if accumulation == "bf16" and stage == 3:
        return FP32_BYTES + BF16_BYTES
    return FP32_BYTES
