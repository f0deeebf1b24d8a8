"""Host memory for a copy of this rank's ranges that no later step can change, and the choice how
periodic saves are made.

    copy      the state is copied, and the copy is written; training waits for the copy at most
    stream    the state is written as it lies; the next update waits until it is written
    wait      training stands still until the checkpoint is complete

The buffers of a copy are allocated at the first save and kept, so that no later save can fail for
lack of memory.
"""

from __future__ import annotations

import logging
import socket
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cpt.checkpoint.flat_range import FlatRange
from cpt.errors import ConfigError
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.storage.allocation import page_locked_bytes

log = logging.getLogger("cpt.checkpoint")

Way = Literal["copy", "stream", "wait"]
"""How a save is made."""
AsyncSave = bool | Literal["auto", "stream"]
"""Values of `checkpoint.async_save`."""
ROOM_FOR_COPY = 1.1
"""Host memory that must be free for a copy, as a multiple of its size, if nobody asked for it."""


class Staging:
    """Buffers in host memory for the ranges of one rank."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, ranges: dict[str, FlatRange]) -> dict[str, FlatRange]:
        """Return the ranges with their content copied to host memory, valid until the next call.

        On a GPU the copies run on the current stream.

        Raises:
            RuntimeError: there is no memory for the buffers.
        """
        copies = {}
        for key, part in ranges.items():
            exponents = part.exponents
            if exponents is not None:
                exponents = self._copied(f"exponents of {key}", exponents)
            copied = self._copied(key, part.tensor)
            copies[key] = replace(part, tensor=copied, exponents=exponents)
        if any(part.tensor.is_cuda for part in ranges.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _copied(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor to its buffer, and return that."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


def bytes_of_copy(part: FlatRange) -> int:
    """Return the host memory that the buffers of a range take: page-locked if it is on a GPU."""
    taken = 0
    for tensor in (part.tensor, part.exponents):
        if tensor is not None:
            taken += page_locked_bytes(tensor.nbytes) if tensor.is_cuda else tensor.nbytes
    return taken


class HostNeed(NamedTuple):
    """What a copy takes of one rank's node; it travels between ranks as a JSON list."""

    host: str
    """Name of the node."""
    own_bytes: int
    """Bytes that the copies of this rank take."""
    available_bytes: int | None
    """Memory that its processes can still take; None if the system does not say."""


def agreed_way(wanted: AsyncSave, moving: dict[str, FlatRange], topology: Topology) -> Way:
    """Return how periodic saves are made; all ranks call it together, once the state is allocated.

    Args:
        wanted: `checkpoint.async_save`.
        moving: What this rank would copy.
        topology: The ranks.

    Raises:
        ConfigError: see `choose_way`.
    """
    own_bytes = sum(bytes_of_copy(part) for part in moving.values())
    need = HostNeed(socket.gethostname(), own_bytes, available_bytes())
    gathered = gather_json(need, topology.control_group)
    way, why = choose_way(wanted, [HostNeed(*one) for one in gathered])
    if why and topology.rank == 0:
        log.info(
            "periodic saves write the state as it lies, and the next update waits until it is "
            "written: a copy needs %s",
            why,
        )
    return way


def choose_way(wanted: AsyncSave, needs: list[HostNeed]) -> tuple[Way, str]:
    """Return how periodic saves are made; the same on all ranks, because all see the same needs.

    Args:
        wanted: `checkpoint.async_save`.
        needs: The need of every rank.

    Returns:
        The way, and why there is no copy if nobody has chosen that.

    Raises:
        ConfigError: a copy is asked for, and a node has too little memory for it.
    """
    if wanted is False:
        return "wait", ""
    if wanted == "stream":
        return "stream", ""
    short = _too_small(needs, ROOM_FOR_COPY if wanted == "auto" else 1.0)
    if not short:
        return "copy", ""
    if wanted == "auto":
        return "stream", short
    raise ConfigError(
        f"checkpoint.async_save: true copies the state to host memory: {short}. "
        "Use --set checkpoint.async_save=stream, which needs no copy."
    )


def _too_small(needs: list[HostNeed], room: float) -> str:
    """Return which node has too little memory for the copies of its ranks; "" if none has."""
    wanted: dict[str, int] = defaultdict(int)
    available: dict[str, int] = {}
    for need in needs:
        wanted[need.host] += need.own_bytes
        if need.available_bytes is not None:
            seen = available.get(need.host, need.available_bytes)
            available[need.host] = min(seen, need.available_bytes)
    short = [host for host in available if room * wanted[host] > available[host]]
    if not short:
        return ""
    host = min(short)
    own = max(need.own_bytes for need in needs if need.host == host)
    text = (
        f"{own / 1e9:.1f} GB of each rank, {wanted[host] / 1e9:.1f} GB on {host}, where "
        f"{available[host] / 1e9:.1f} GB are available"
    )
    others = len(short) - 1
    return f"{text} ({others} more nodes have too little)" if others else text


def available_bytes() -> int | None:
    """Return the memory that processes of this node can still take, within the limit of its cgroup.

    None if the system does not say.
    """
    known = [size for size in (_system_available(), _cgroup_available()) if size is not None]
    return min(known) if known else None


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
    """Return the memory that is left of this process's cgroup, as in a container or a SLURM job.

    SLURM limits the cgroups of a job and of a step, and processes are in one below these.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    root = Path("/sys/fs/cgroup")
    found = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":  # version 2
            for folder in _with_those_above(root, own):
                found.append(_left_in(folder, "memory.max", "memory.current", ""))
        elif "memory" in controllers.split(","):
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            for folder in _with_those_above(root / "memory", own):
                found.append(_left_in(folder, limit, usage, "total_"))
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _with_those_above(root: Path, own: str) -> list[Path]:
    """Return the folders of a cgroup and of those that it is part of, up to the root.

    In a container the root is that of the container, and the rest of the path may be the host's.
    """
    folders = [root]
    for name in own.split("/"):
        if name:
            folders.append(folders[-1] / name)
    return folders


def _left_in(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    """Return the memory that is left in one cgroup; None if it has no limit or cannot be read.

    Args:
        folder: The folder of the cgroup.
        limit_file: Its file for the limit.
        usage_file: Its file for the memory in use, the pages of files included.
        prefix: What the counters of all processes in it begin with.
    """
    try:
        limit = (folder / limit_file).read_text(encoding="ascii").strip()
        used = int((folder / usage_file).read_text(encoding="ascii"))
        reclaimable = 0
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith((f"{prefix}inactive_file ", f"{prefix}active_file ")):
                reclaimable += int(line.split()[1])
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + reclaimable)
