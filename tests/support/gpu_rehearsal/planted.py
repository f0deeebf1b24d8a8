"""Errors put into a layer on purpose, which a rehearsal must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpt.model.experts.layer import LocalExperts


def _host_tensor(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM + torch.ones(rows_RM.shape[1], dtype=rows_RM.dtype)


def _item(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM * rows_RM[0, 0].item()


def _unfused_copy(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM.float().to(rows_RM.dtype)


@torch.library.custom_op("cpt_planted::no_fake", mutates_args=())
def _no_fake(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM.clone()


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "host tensor": _host_tensor,
    "item": _item,
    "unfused copy": _unfused_copy,
    "no fake implementation": lambda rows_RM: _no_fake(rows_RM),
}
"""What each error does to the rows on their way to the experts."""


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Let every expert layer make a mistake inside the block."""
    if fault is None:
        yield
        return
    change = CHANGES[fault]
    right = LocalExperts.forward

    def wrong(module: LocalExperts, rows_RM: torch.Tensor, *args: Any) -> torch.Tensor:
        return right(module, change(rows_RM), *args)

    LocalExperts.forward = wrong  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        LocalExperts.forward = right  # type: ignore[method-assign]
