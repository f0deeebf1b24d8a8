"""The peak of a GPU by the name that CUDA gives it, and the share of it that training reaches.

Peaks are those of NVIDIA's data sheets: dense bf16, without sparsity.
"""

from __future__ import annotations

import re

from transformers import GptOssConfig

from cpt.planning.flops import flops_per_token
from cpt.planning.trained_weights import ALL, TrainedShares

PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH100 NVL\b|\bH200 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bGH200\b|\bH200\b|\bH100\b|\bH800\b", 989e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bRTX 4090\b", 165e12),
)
"""Patterns of names with the operations per second; the first that matches counts."""


def bf16_peak(device_name: str) -> float | None:
    """Return the bf16 operations per second of a GPU; None if its data sheet is not known here."""
    for pattern, peak in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def utilization(
    model: GptOssConfig,
    seq_len: int,
    tokens_per_gpu_second: float,
    device_name: str,
    trained: TrainedShares = ALL,
) -> float | None:
    """Return the share of the peak that training reaches (MFU); None without a known peak.

    It counts the operations of `flops_per_token`: what is computed again, and padding, do not
    count, and rows count as one document each, whose attention costs the most.

    Args:
        model: The architecture.
        seq_len: Tokens of a row.
        tokens_per_gpu_second: Predicted tokens of a second, by GPU.
        device_name: As in `torch.cuda.get_device_name`.
        trained: The weights that have gradients.
    """
    peak = bf16_peak(device_name)
    if peak is None:
        return None
    flops = flops_per_token(model, seq_len, trained)
    return tokens_per_gpu_second * flops.total / peak
