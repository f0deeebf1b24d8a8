"""Which implementation of sink attention runs: a table of backends, best first, and the choice among them.

To add a backend, write its kernel (see `cpt.model.attention.function.Kernel`) and put a line into BACKENDS. `usable`
says why a backend cannot run, in words for the user, so that a refusal names every reason at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpt.model.attention.cpu import CpuKernel
from cpt.model.attention.function import Attention, FoldedSinks
from cpt.model.attention.reference import reference_attention

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a backend has to work with."""

    device: torch.device
    """Where the tensors are."""
    dtype: torch.dtype
    """Type of queries, keys and values."""
    head_dim: int
    """Size of a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One implementation of sink attention."""

    name: str
    """Name in the run YAML's `model.attention`."""
    attention: Attention
    """The implementation."""
    usable: Callable[[Demand], str | None]
    """Why it cannot serve a demand, or None."""


def choose(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """Return the implementation called `name`, or for "auto" the first one that can run.

    "auto" never takes the reference, whose memory grows with the square of the row: it has to be asked for.

    Raises:
        ValueError: There is no such backend, or it cannot run here; the message says why.
    """
    demand = Demand(device=device, dtype=dtype, head_dim=head_dim)
    if name == AUTO:
        candidates = [backend for backend in BACKENDS if backend.attention is not reference_attention]
    else:
        candidates = [backend for backend in BACKENDS if backend.name == name]
    if not candidates:
        raise ValueError(f"unknown attention {name!r}. Known are: {', '.join(known_names())}.")
    reasons = []
    for backend in candidates:
        reason = backend.usable(demand)
        if reason is None:
            return backend.attention
        reasons.append(f"{backend.name}: {reason}")
    hint = 'Use attention "auto".' if name != AUTO else 'For short rows, attention "reference" runs everywhere.'
    raise ValueError(f"attention {name!r} cannot run. {'; '.join(reasons)}. {hint}")


def known_names() -> tuple[str, ...]:
    """Return what `choose` takes as a name."""
    return (AUTO, *(backend.name for backend in BACKENDS))


def _always_usable(demand: Demand) -> None:
    return None


def _cpu_usable(demand: Demand) -> str | None:
    if demand.device.type != "cpu":
        return f"it reads CPU tensors, these are on {demand.device}"
    if demand.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it has no code for {demand.dtype}"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return f"torch {torch.__version__} lacks the operator _scaled_dot_product_flash_attention_for_cpu"
    return None


BACKENDS = (
    Backend(name="cpu", attention=FoldedSinks(CpuKernel()), usable=_cpu_usable),
    Backend(name="reference", attention=reference_attention, usable=_always_usable),
)
"""In the order in which "auto" tries them."""
