"""Copies between host and device for which neither side waits.

A copy from pageable memory makes the host wait until the device has done everything before it. A
copy from page-locked memory does not. Its source may be released at once: torch's allocator of
page-locked memory gives a block away only after the copies that were issued from it are done.
"""

from __future__ import annotations

import torch


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in page-locked memory, on any thread.

    This is the only place where data on its way to a device is pinned, so that a rehearsal without
    a driver can replace it.
    """
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor on a device, in the order of the current stream; the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)
