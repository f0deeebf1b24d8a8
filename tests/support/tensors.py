"""Comparison of named tensors to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def differing(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the expected tensors that are other tensors in `got`."""
    return [name for name in expected if not torch.equal(expected[name], got[name])]
