"""Host memory for asynchronous saves: a copy of this rank's ranges that no later step can change.

The buffers are allocated at the first save and kept, so that no later save can fail for lack of
memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cpt.checkpoint.flat_planner import FlatRange
from cpt.errors import ConfigError


class Staging:
    """Buffers in host memory for the ranges of one rank."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, ranges: dict[str, FlatRange]) -> dict[str, FlatRange]:
        """Return the ranges with their content copied to host memory, valid until the next call."""
        copies = {}
        for key, part in ranges.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != part.tensor.shape:
                pinned = part.tensor.is_cuda
                buffer = torch.empty(
                    part.tensor.shape, dtype=part.tensor.dtype, device="cpu", pin_memory=pinned
                )
                self._buffers[key] = buffer
            buffer.copy_(part.tensor.detach(), non_blocking=True)
            copies[key] = FlatRange(
                tensor=buffer, offset=part.offset, global_numel=part.global_numel
            )
        if any(part.tensor.is_cuda for part in ranges.values()):
            torch.cuda.synchronize()
        return copies


def check_host_memory(own_bytes: int, node_bytes: int) -> None:
    """Refuse asynchronous saves that this node has no memory for.

    Args:
        own_bytes: Bytes that this rank copies.
        node_bytes: Bytes that all ranks of this node copy.

    Raises:
        ConfigError: less memory than that is available.
    """
    available = available_bytes()
    if available is not None and node_bytes > available:
        raise ConfigError(
            f"checkpoint.async_save copies {own_bytes / 1e9:.1f} GB of each rank to host memory, "
            f"{node_bytes / 1e9:.1f} GB on this node; {available / 1e9:.1f} GB are available. "
            "Use --set checkpoint.async_save=false."
        )


def available_bytes() -> int | None:
    """Return the memory that processes of this node can still take, within the limit of its cgroup.

    None if the system does not say.
    """
    system = _system_available()
    cgroup = _cgroup_available()
    if system is None or cgroup is None:
        return system if cgroup is None else cgroup
    return min(system, cgroup)


def _system_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """Return the memory that is left of this process's cgroup (version 2), as in a container or a
    SLURM job.
    """
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::")[2]
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        reclaimable = 0
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith(("inactive_file ", "active_file ")):
                reclaimable += int(line.split()[1])
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + reclaimable)
