"""Peak memory of one pass, beyond its inputs."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

from attention_parts.contenders import Layer, make_step

RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "65536"}
"""Environment in which glibc hands freed memory back at once, so that a peak is what was in use."""


def peak_bytes(name: str, layer: Layer) -> tuple[int, int]:
    """How far memory grows during one pass, and its largest size; on a CPU of this process, resident.

    On a CPU the process should have been started with RETURN_MEMORY.
    """
    small = Layer(
        tokens=64,
        window=layer.window,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        device=layer.device,
    )
    make_step(name, small)()  # loads what is loaded on first use
    step = make_step(name, layer)
    gc.collect()
    if layer.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
        return peak - before, peak
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = _resident("VmRSS")
    step()
    peak = _resident("VmHWM")
    return peak - before, peak


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be told: on any GPU, and on Linux."""
    return device.type == "cuda" or (sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK))


def free_bytes(device: torch.device) -> int:
    """What could still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _resident(field: str) -> int:
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
