"""Memory for parameters whose values come later, and what page-locked memory takes."""

from __future__ import annotations

import torch
from torch import nn


def allocate(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return the same parameter with its marks, uninitialized on a device."""
    real = nn.Parameter(
        torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad
    )
    real.__dict__.update(parameter.__dict__)
    return real


def page_locked_bytes(size: int) -> int:
    """Return the bytes that torch takes for a page-locked tensor of a size: a power of two.

    Read in CachingHostAllocator.h of torch 2.13; pytorch/pytorch#150517 is about it.
    """
    return 1 << (size - 1).bit_length() if size else 0


def release_page_locked() -> None:
    """Give page-locked memory that nothing holds any more back to the system.

    torch keeps it for tensors to come.
    """
    # torch 2.11 has no public function for it; builds without a GPU have none at all.
    if torch.cuda.is_available() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
