"""The table of attention backends, best first, and the choice among them.

To add a backend, write its kernel (see `cpt.model.attention.interface.Kernel`) and put a line into
BACKENDS. Its `problems` say why it cannot run and what would help, in words for the user, so that a
refusal names every reason at once. Nothing is imported from a GPU package before its backend runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpt.model.attention import flash_attn_2, flash_attn_4, flex, torch_flash
from cpt.model.attention.cpu import CpuKernel
from cpt.model.attention.function import FoldedSinks
from cpt.model.attention.interface import Attention
from cpt.model.attention.machine import Machine
from cpt.model.attention.reference import reference_attention

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One implementation of sink attention."""

    name: str
    """Name in the run YAML's `model.attention`."""
    attention: Attention
    """The function that computes the attention."""
    device_type: str | None
    """The type of device that it runs on, as in torch.device.type; None for any."""
    problems: Callable[[Machine, torch.dtype, int], list[str]]
    """Returns why it cannot serve this dtype and head size on a machine, and what would help."""

    def usable(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, machine: Machine
    ) -> str | None:
        """Return why it cannot serve such tensors and what would help, or None if it can."""
        reasons = []
        if self.device_type not in (None, device.type):
            reads = str(self.device_type).upper()
            reasons.append(f"it reads {reads} tensors, these are on {device}")
        reasons += self.problems(machine, dtype, head_dim)
        return "; ".join(reasons) or None


def choose(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    machine: Machine | None = None,
) -> Attention:
    """Return the implementation called `name`, or for "auto" the first one that can run.

    "auto" never takes the reference, whose memory grows with the square of the row: it has to be
    asked for.

    Args:
        name: One of `known_names()`.
        device: Where the tensors are.
        dtype: Type of queries, keys and values.
        head_dim: Size of a head.
        machine: Facts about `device`; by default they are read from it.

    Raises:
        ValueError: There is no such backend, or it cannot run here; the message says why.
    """
    backend = chosen_backend(name, device=device, dtype=dtype, head_dim=head_dim, machine=machine)
    return backend.attention


def chosen_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    machine: Machine | None = None,
) -> Backend:
    """Return the line of the table that `choose` takes, for the same arguments."""
    machine = machine or Machine.of(device)
    if name == AUTO:
        candidates = [backend for backend in BACKENDS if backend.device_type == device.type]
    else:
        candidates = [backend for backend in BACKENDS if backend.name == name]
        if not candidates:
            raise ValueError(f"unknown attention {name!r}. Known are: {', '.join(known_names())}.")
    reasons = []
    for backend in candidates:
        reason = backend.usable(device, dtype, head_dim, machine)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    why = ". ".join(reasons) or f"nothing but the reference runs on {device}"
    hint = 'Use attention "auto".'
    if name == AUTO:
        hint = 'For short rows, attention "reference" runs everywhere.'
    raise ValueError(f"attention {name!r} cannot run. {why}. {hint}")


def known_names() -> tuple[str, ...]:
    """Return what `choose` takes as a name."""
    return (AUTO, *(backend.name for backend in BACKENDS))


def _no_problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    return []


def _cpu_problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    found = []
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found.append(f"it has no code for {dtype}")
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        found.append(
            f"torch {machine.torch_build} lacks the operator "
            "_scaled_dot_product_flash_attention_for_cpu"
        )
    return found


BACKENDS = (
    Backend(
        name="flash_attn_4",
        attention=flash_attn_4.FlashAttn4(),
        device_type="cuda",
        problems=flash_attn_4.problems,
    ),
    Backend(
        name="torch_flash",
        attention=FoldedSinks(torch_flash.TorchFlashKernel()),
        device_type="cuda",
        problems=torch_flash.problems,
    ),
    Backend(
        name="flash_attn_2",
        attention=FoldedSinks(flash_attn_2.FlashAttn2Kernel()),
        device_type="cuda",
        problems=flash_attn_2.problems,
    ),
    Backend(name="flex", attention=flex.Flex(), device_type="cuda", problems=flex.problems),
    Backend(
        name="cpu", attention=FoldedSinks(CpuKernel()), device_type="cpu", problems=_cpu_problems
    ),
    Backend(
        name="reference", attention=reference_attention, device_type=None, problems=_no_problems
    ),
)
"""The backends, in the order in which "auto" tries them."""
