"""Whether the Triton kernels run where a tensor lives."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

SWITCH = "CPT_FUSED_KERNELS"
"""Environment variable; 0 sends every operator through its eager body, to compare the two."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which bf16 arithmetic is native."""


def fused_kernels_run_on(tensor: torch.Tensor) -> bool:
    """Return whether operators on this tensor launch Triton kernels, which compute in fp32."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or os.environ.get(SWITCH) == "0":
        return False
    return _serves(tensor.device)


@functools.cache
def _serves(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
