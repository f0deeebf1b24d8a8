"""Memory for parameters whose values come later."""

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
