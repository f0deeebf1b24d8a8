"""Time and peak memory of one pass, their statistics, and the publication of the figures."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import socket
import statistics
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
    """Return the time of one pass on the wall clock, or in CPU seconds of the process."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = read()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return read() - started


def peak_bytes(step: Step, device: torch.device) -> tuple[int, int]:
    """Return how far memory grows during one pass, and its largest size, in bytes.

    On a CPU this is the resident memory of this process, which should have been started with
    RETURN_MEMORY.
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
    """Start a new peak of this process's resident memory, and return its size.  Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return resident_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak`."""
    return resident_bytes("VmHWM")


def can_measure_memory(device: torch.device) -> bool:
    """Return whether peaks can be measured: on any GPU, and on Linux."""
    if device.type == "cuda":
        return True
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def free_bytes(device: torch.device) -> int:
    """Return how much could still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def fits(num_bytes: int, share: float, device: torch.device) -> bool:
    """Return whether so many bytes are at most this share of what could still be allocated."""
    return num_bytes <= share * free_bytes(device)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def origin(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Return where figures come from, beside the sizes that were measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "clock": options.clock,
        "threads": options.threads,
    }


def resident_bytes(field: str) -> int:
    """Return a size of /proc/self/status: VmRSS, VmHWM, RssAnon, ...  Linux only."""
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def free_port() -> str:
    """Return a port of this machine that nobody listens on, for MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def single_process() -> dict[str, str]:
    """Return the environment of the only rank of a process group."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }


def publish(
    report: dict[str, Any],
    options: argparse.Namespace,
    draw: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Print where the figures come from, and write what `--json` and `--svg` ask for."""
    print(json.dumps(report["machine"]))
    if options.json:
        _write(options.json, json.dumps(report, indent=1) + "\n")
    if draw is not None and options.svg:
        _write(options.svg, draw(report))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def median_ratios(times: dict[str, list[float]], reference: str) -> dict[str, float]:
    """Return the median over the rounds of each contender's time over that of the reference."""
    ratios = {}
    for name, values in times.items():
        pairs = zip(values, times[reference], strict=True)
        ratios[name] = statistics.median(other / own for other, own in pairs)
    return ratios


def in_mib(peaks: dict[str, int | None]) -> dict[str, float | None]:
    """Convert bytes to MiB; a peak that was not measured stays None."""
    return {name: None if peak is None else peak / 2**20 for name, peak in peaks.items()}


def figures_of(result: dict[str, Any], ours: str) -> list[str]:
    """Return time, ratio and peak of each contender, then those left out, one text each."""
    texts = []
    for name, milliseconds in result["ms"].items():
        text = f"{name} {milliseconds:.1f} ms"
        if name != ours:
            text += f" ({result['ratio to ours'][name]:.2f}x)"
        peak = result["peak MiB"][name]
        if peak is not None:
            text += f" {peak:.0f} MiB"
        texts.append(text)
    for name, reason in result["left out"].items():
        texts.append(f"{name} left out: {reason}")
    return texts
