"""What the benchmarks measure with: time and peak memory of one pass, and where the figures come
from.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], None]

RETURN_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "65536",
}
"""Environment in which glibc hands freed memory back at once, so that a peak is what was in use."""


def seconds(step: Step, device: torch.device, clock: str) -> float:
    """Time of one pass."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = read()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return read() - started


def peak_bytes(step: Step, device: torch.device) -> tuple[int, int]:
    """How far memory grows during one pass, and its largest size; on a CPU of this process,
    resident.

    On a CPU the process should have been started with RETURN_MEMORY.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
        return peak - before, peak
    before = reset_peak()
    step()
    peak = peak_resident_bytes()
    return peak - before, peak


def reset_peak() -> int:
    """Start a new peak of this process's resident memory; returns what is resident now.  Linux
    only.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return resident_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The largest resident memory of this process since `reset_peak`."""
    return resident_bytes("VmHWM")


def can_measure_memory(device: torch.device) -> bool:
    """Whether peaks can be told: on any GPU, and on Linux."""
    return device.type == "cuda" or (
        sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
    )


def free_bytes(device: torch.device) -> int:
    """What could still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def device_name(device: torch.device) -> str:
    """Name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


def resident_bytes(field: str) -> int:
    """A size of /proc/self/status: VmRSS, VmHWM, RssAnon, ...  Linux only."""
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def free_port() -> str:
    """A port of this machine that nobody listens on now, as MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def publish(
    report: dict[str, Any],
    options: argparse.Namespace,
    draw: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Print where the figures come from; write them and their plot where `--json` and `--svg` ask
    for it.
    """
    print(json.dumps(report["machine"]))
    texts = {"json": lambda: json.dumps(report, indent=1) + "\n"}
    if draw is not None:
        texts["svg"] = lambda: draw(report)
    for name, text in texts.items():
        path = getattr(options, name)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
