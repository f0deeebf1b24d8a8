"""The links that NCCL can use on this node, read from the kernel's files and the environment.

NCCL opens libibverbs when it starts.  Where the library is missing, as in many container images, it
uses TCP, tens of times slower, and says so only in its debug log.  What it chose cannot be asked
for, so this module looks at what it needs: ports, their device files, the library, a plugin for
EFA, and the variables that people set.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VARIABLES = (
    "NCCL_NET",
    "NCCL_NET_PLUGIN",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE",
    "NCCL_CROSS_NIC",
    "FI_PROVIDER",
)
"""Variables that decide what NCCL uses; they are shown where they are set."""
VERBS = ("libibverbs.so", "libibverbs.so.1")
"""Names under which NCCL opens the library."""
INSTALL_VERBS = "Install libibverbs1, ibverbs-providers and librdmacm1 (Debian, Ubuntu)"
_RATE = re.compile(r"([0-9.]{1,20}) Gb/sec")


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One port of an InfiniBand, RoCE or EFA device."""

    device: str
    """Name of the device, such as mlx5_0."""
    link: str
    """InfiniBand, RoCE or EFA."""
    active: bool
    """Whether the link is up."""
    gbit: float
    """Rate of the link in Gbit/s, in one direction; 0 if the kernel does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transport:
    """Facts about the links of one node, as this process sees them."""

    ports: tuple[Port, ...] = ()
    """Ports of the node."""
    has_verbs: bool = False
    """Whether libibverbs can be loaded here."""
    has_device_files: bool = False
    """Whether /dev/infiniband has device files, which containers must be given."""
    has_plugin: bool = False
    """Whether NCCL's network plugin can be loaded here; looked for only where EFA is."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Those of `VARIABLES` that are set."""

    def active_ports(self) -> list[Port]:
        """Return the ports whose link is up."""
        return [port for port in self.ports if port.active]

    def describe_ports(self) -> str:
        """Return the ports in use for people: `InfiniBand mlx5_0, mlx5_1 (800 Gbit/s)`."""
        ports = self.active_ports()
        if not ports:
            return "no active port"
        gbit = sum(port.gbit for port in ports)
        rate = f" ({gbit:g} Gbit/s)" if gbit else ""
        return f"{ports[0].link} {', '.join(port.device for port in ports)}{rate}"

    def describe(self) -> str:
        """Return what NCCL uses between nodes, for people."""
        wanted = self._why_tcp_is_wanted()
        if wanted:
            return f"TCP ({wanted})"
        if not self.ports:
            return "TCP (no InfiniBand, RoCE or EFA device)"
        if self.problem():
            return "TCP"
        return self.describe_ports()

    def problem(self) -> str:
        """Return why NCCL cannot use a port that is there, with the cure; empty if it can."""
        if not self.ports or self._why_tcp_is_wanted():
            return ""
        devices = ", ".join(dict.fromkeys(port.device for port in self.ports))
        if not self.active_ports():
            return f"no port of {devices} is active, so NCCL uses TCP"
        if not self.has_device_files:
            return (
                f"the node has {devices}, but no /dev/infiniband/uverbs* is visible here, so NCCL "
                "uses TCP. Give the container these devices (Docker: --device=/dev/infiniband "
                "--ulimit memlock=-1)"
            )
        if self.active_ports()[0].link == "EFA":
            if self.has_plugin:
                return ""
            return (
                f"the node has EFA ({devices}), but NCCL's plugin libnccl-net.so is not in this "
                "environment, so NCCL uses TCP. Install aws-ofi-nccl and libfabric, and add their "
                "folders to LD_LIBRARY_PATH"
            )
        if not self.has_verbs:
            return (
                f"the node has {devices}, but there is no libibverbs in this environment, so NCCL "
                f"uses TCP. {INSTALL_VERBS}, or load the module that brings them"
            )
        return ""

    def _why_tcp_is_wanted(self) -> str:
        """Return the variable by which somebody chose TCP; empty if nobody did."""
        if self.variables.get("NCCL_NET", "").lower() == "socket":
            return "NCCL_NET=Socket"
        if self.variables.get("NCCL_IB_DISABLE", "0") != "0":
            return f"NCCL_IB_DISABLE={self.variables['NCCL_IB_DISABLE']}"
        return ""


def read_transport(
    root: Path = Path("/"),
    variables: Mapping[str, str] = os.environ,
    load: Callable[[str], Any] = ctypes.CDLL,
) -> Transport:
    """Look at the links of this node.

    Args:
        root: Folder that holds `sys` and `dev`.
        variables: The environment.
        load: Opens a shared library; raises OSError if there is none of that name.
    """
    ports = read_ports(root / "sys" / "class" / "infiniband")
    has_plugin = False
    if any(port.link == "EFA" for port in ports):
        has_plugin = _can_load(plugin_names(variables), load)
    device_files = root / "dev" / "infiniband"
    named = {}
    for name in VARIABLES:
        if variables.get(name, ""):
            named[name] = variables[name]
    return Transport(
        ports=tuple(ports),
        has_verbs=_can_load(VERBS, load),
        has_device_files=device_files.is_dir() and any(device_files.glob("uverbs*")),
        has_plugin=has_plugin,
        variables=named,
    )


def read_ports(folder: Path) -> list[Port]:
    """Return the ports of the devices that the kernel lists in a folder, by name."""
    ports = []
    for device in sorted(folder.glob("*")):
        driver = device / "device" / "driver"
        is_efa = driver.exists() and driver.resolve().name == "efa"
        for port in sorted((device / "ports").glob("*")):
            link = _read(port / "link_layer")
            if is_efa:
                link = "EFA"
            elif link == "Ethernet":
                link = "RoCE"
            rate = _RATE.match(_read(port / "rate"))
            ports.append(
                Port(
                    device=device.name,
                    link=link or "InfiniBand",
                    active="ACTIVE" in _read(port / "state"),
                    gbit=float(rate[1]) if rate else 0.0,
                )
            )
    return ports


def plugin_names(variables: Mapping[str, str]) -> list[str]:
    """Return the file names under which NCCL looks for its network plugin."""
    names = ["libnccl-net.so"]
    wanted = variables.get("NCCL_NET_PLUGIN", "")
    if wanted:
        names = [wanted, f"libnccl-net-{wanted}.so", *names]
    return names


def _can_load(names: list[str] | tuple[str, ...], load: Callable[[str], Any]) -> bool:
    for name in names:
        try:
            load(name)
        except OSError:
            continue
        return True
    return False


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:  # some drivers refuse to tell the rate of a port that is down
        return ""


def nccl_version() -> str:
    """Return the version of torch's NCCL; empty if this torch has none."""
    if not torch.cuda.is_available():
        return ""
    found = torch.cuda.nccl.version()
    return ".".join(str(part) for part in found)


def gpus_apart() -> list[tuple[int, int]]:
    """Return the pairs of this process's GPUs that cannot reach each other's memory.

    NCCL sends between them through host memory, which is many times slower than NVLink.
    """
    apart = []
    for first in range(torch.cuda.device_count()):
        for second in range(first + 1, torch.cuda.device_count()):
            if not torch.cuda.can_device_access_peer(first, second):
                apart.append((first, second))
    return apart
