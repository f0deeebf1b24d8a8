"""Bytes that the training state of one parameter takes, in memory and in files."""

from __future__ import annotations

FP32_BYTES = 4
OPTIMIZER_BYTES = 3 * FP32_BYTES
"""fp32 master weight and two Adam moments; a checkpoint keeps the same of a trained parameter."""


def host_gradient_bytes(zero_stage: int) -> int:
    """Return the bytes of a parameter's gradient where the optimizer state is offloaded.

    ZeRO-3 holds the gradient twice, in fp32: as it adds up, and as Adam reads it.
    """
    copies = 2 if zero_stage == 3 else 1
    return copies * FP32_BYTES
