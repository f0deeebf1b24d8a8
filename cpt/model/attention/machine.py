"""Facts about this machine that decide which attention backends can run.

They are the GPU, the build of torch, and the installed packages. They are read once per device and
passed on as a value, so that a refusal can be tested without the machine it is for.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from packaging.version import Version

PACKAGES = ("flash-attn", "flash-attn-4", "triton")
"""Distributions that some backend needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The facts about one machine, or about one that a test makes up."""

    compute_capability: tuple[int, int] | None
    """Generation of the GPU, such as (9, 0) for an H100; None without a CUDA GPU."""
    torch_build: str
    """Version of torch with its build, such as 2.13.0+cu130."""
    torch_has_flash: bool
    """Whether torch was built with the FlashAttention-2 kernels."""
    is_rocm: bool = False
    """Whether torch was built for AMD GPUs."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed version of each of PACKAGES that is installed."""

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Read the facts that hold for tensors on `device`."""
        return _machine_of(device if device.type == "cuda" else None)

    def lacks(self, package: str, minimum: str) -> str | None:
        """Return what is wrong with the installed version of a package, or None."""
        installed = self.packages.get(package)
        cure = f"pip install '{package}>={minimum}'"
        if installed is None:
            return f"package {package} is not installed: {cure}"
        if Version(installed) < Version(minimum):
            return f"package {package} {installed} is older than {minimum}: {cure}"
        return None


@functools.cache
def _machine_of(cuda_device: torch.device | None) -> Machine:
    capability = None
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(cuda_device)
    installed = {name: installed_version(name) for name in PACKAGES}
    return Machine(
        compute_capability=capability,
        torch_build=torch.__version__,
        torch_has_flash=torch.backends.cuda.is_flash_attention_available(),
        is_rocm=torch.version.hip is not None,
        packages={name: version for name, version in installed.items() if version is not None},
    )


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
