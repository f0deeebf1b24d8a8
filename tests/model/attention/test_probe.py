"""The probe lets the right attention pass and finds each silent error seen in the wild."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt.errors import ConfigError
from cpt.model.attention import (
    Attention,
    AttentionInputs,
    FoldedSinks,
    PackedRows,
    choose,
    reference_attention,
)
from cpt.model.attention.cpu import CpuKernel
from cpt.model.attention.probe import run_probe

CPU = torch.device("cpu")


def probe(attention: Attention, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> float:
    shape: dict[str, Any] = {"head_dim": 32, "num_query_heads": 8, "num_kv_heads": 2, "window": 128}
    return run_probe(attention, device=CPU, dtype=dtype, **(shape | arguments)).largest_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 2, 32, 128), (64, 8, 64, 128), (8, 8, 16, 32)])
def test_cpu_backend_passes(dtype: torch.dtype, heads: tuple[int, int, int, int]) -> None:
    attention = choose("auto", device=CPU, dtype=dtype, head_dim=heads[2])
    names = ("num_query_heads", "num_kv_heads", "head_dim", "window")
    assert probe(attention, dtype, **dict(zip(names, heads, strict=True))) > 0


@dataclass(frozen=True)
class Spoiled:
    """The right attention with one thing changed."""

    change: Callable[[AttentionInputs], Tensor]

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        return self.change(inputs)


right = FoldedSinks(CpuKernel())


def window_of_129_keys(inputs: AttentionInputs) -> Tensor:
    wider = None if inputs.window is None else inputs.window + 1
    return right(inputs._replace(window=wider))


def sinks_dropped(inputs: AttentionInputs) -> Tensor:
    return right(inputs._replace(sinks_H=inputs.sinks_H * 0 - 1e4))


def sinks_frozen(inputs: AttentionInputs) -> Tensor:
    return right(inputs._replace(sinks_H=inputs.sinks_H.detach()))


def sinks_scaled(inputs: AttentionInputs) -> Tensor:
    return right(inputs._replace(sinks_H=inputs.sinks_H * inputs.scale))


def documents_not_isolated(inputs: AttentionInputs) -> Tensor:
    seq_len = inputs.rows.seq_len
    return right(inputs._replace(rows=PackedRows.from_bounds([[0, seq_len]], seq_len)))


def window_lost(inputs: AttentionInputs) -> Tensor:
    return right(inputs._replace(window=None))


class _KeepsValue(torch.autograd.Function):
    """`right` in value, with the gradient of out * sigmoid(lse - sink) without that of lse."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def lse_gradient_dropped(inputs: AttentionInputs) -> Tensor:
    sinks = inputs.sinks_H
    value = right(inputs)
    plain = reference_attention(inputs._replace(sinks_H=sinks.detach() * 0 - 1e4))
    with torch.no_grad():
        factor = (value.float() * plain.float()).sum(-1, keepdim=True) / plain.float().square().sum(
            -1, keepdim=True
        )
    wrong = plain * factor.to(plain.dtype) + (value - value.detach()) * 0
    return _KeepsValue.apply(value.detach(), wrong) + (sinks.sum() * 0).to(value.dtype)


class _RoundedLse(CpuKernel):
    """Keeps its log-sum-exp in bf16, as Hugging Face's flex path does."""

    def forward(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse, extra = super().forward(inputs)
        return out, lse.bfloat16().to(lse.dtype), extra


def lse_in_bf16(inputs: AttentionInputs) -> Tensor:
    return FoldedSinks(_RoundedLse())(inputs)


SILENT_ERRORS = [
    window_of_129_keys,
    window_lost,
    sinks_dropped,
    sinks_frozen,
    sinks_scaled,
    documents_not_isolated,
    lse_gradient_dropped,
    lse_in_bf16,
]


@pytest.mark.parametrize("change", SILENT_ERRORS, ids=lambda change: change.__name__)
def test_silent_error_is_refused_with_its_figures(
    change: Callable[[AttentionInputs], Tensor],
) -> None:
    with pytest.raises(ConfigError, match="attention is wrong on cpu") as refused:
        probe(Spoiled(change))
    assert "!" in str(refused.value) and "dsink" in str(refused.value)


def test_attention_that_cannot_run_is_refused_with_its_reason() -> None:
    def broken(inputs: AttentionInputs) -> Tensor:
        raise RuntimeError("no such kernel")

    with pytest.raises(ConfigError, match=r"does not run on cpu.*no such kernel"):
        probe(Spoiled(broken))
