"""Errors put into a layer on purpose, which a rehearsal must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from cpt.model.decoder_layer import InputNorm
from cpt.model.experts.layer import LocalExperts


def _host_tensor(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM + torch.ones(rows_RM.shape[1], dtype=rows_RM.dtype)


def _item(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM * rows_RM[0, 0].item()


@torch.library.custom_op("cpt_planted::no_fake", mutates_args=())
def _no_fake(rows_RM: torch.Tensor) -> torch.Tensor:
    return rows_RM.clone()


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "host tensor": _host_tensor,
    "item": _item,
    "no fake implementation": lambda rows_RM: _no_fake(rows_RM),
}
"""What each error does to the rows on their way to the experts."""


def _wrong_experts(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    right = LocalExperts.forward

    def wrong(module: LocalExperts, rows_RM: torch.Tensor, *args: Any) -> torch.Tensor:
        return right(module, change(rows_RM), *args)

    return wrong


def _unfused_norm(norm: InputNorm, hidden_BSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize by Hugging Face's code, one operator after another."""
    return hidden_BSM, GptOssRMSNorm.forward(norm, hidden_BSM)


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Let every layer make a mistake inside the block."""
    if fault is None:
        yield
        return
    patch = pytest.MonkeyPatch()
    if fault == "unfused norm":
        patch.setattr(InputNorm, "forward", _unfused_norm)
    else:
        patch.setattr(LocalExperts, "forward", _wrong_experts(CHANGES[fault]))
    try:
        yield
    finally:
        patch.undo()
