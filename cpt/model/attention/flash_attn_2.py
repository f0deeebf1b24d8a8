"""FlashAttention 2 from the package flash-attn, folded with the sinks as
`cpt.model.attention.function` says.

Decisions
    The inner forward and backward functions are called, whose arguments include out and the
    log-sum-exp. The public `flash_attn_varlen_func` returns a log-sum-exp too, but its backward
    drops the gradient of it. Everything after the tensors goes by keyword: the inner functions
    gained arguments between releases.

Source of the signatures: flash_attn/flash_attn_interface.py of flash-attn 2.8.

Shape suffixes: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpt.model.attention.machine import Machine
from cpt.model.attention.rows import PackedRows
from cpt.model.attention.varlen import (
    Documents,
    checked_lse,
    gpu_problems,
    keys_to_the_left,
    tokens_first,
)

PACKAGE = "flash-attn"
MINIMUM_VERSION = "2.8"


@dataclass(frozen=True, slots=True)
class FlashAttn2Kernel:
    """The `cpt.model.attention.function.Kernel` of the package flash-attn."""

    def forward(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return out, lse, and the state of the random numbers, which the backward takes although
        it draws none.
        """
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        q_THD, k_TKD, v_TKD = map(tokens_first, (q_HTD, k_KTD, v_KTD))
        out_THD, lse_HT, _, rng_state = _flash_attn_varlen_forward(
            q_THD,
            k_TKD,
            v_TKD,
            **_settings(rows, window, scale, q_HTD.device),
            return_softmax=False,
        )
        return tokens_first(out_THD), checked_lse(lse_HT, q_HTD, PACKAGE), (rng_state,)

    def backward(
        self,
        d_out_HTD: Tensor,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        out_HTD: Tensor,
        lse_HT: Tensor,
        extra: tuple[Tensor, ...],
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv, which the kernel writes into tensors that it is given."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        d_out, q, k, v, out = map(tokens_first, (d_out_HTD, q_HTD, k_KTD, v_KTD, out_HTD))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _flash_attn_varlen_backward(
            d_out,
            q,
            k,
            v,
            out,
            lse_HT.contiguous(),
            dq,
            dk,
            dv,
            **_settings(rows, window, scale, q_HTD.device),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=extra[0],
        )
        return tokens_first(dq), tokens_first(dk), tokens_first(dv)


def _settings(
    rows: PackedRows, window: int | None, scale: float, device: torch.device
) -> dict[str, Any]:
    """Return the arguments that forward and backward share."""
    documents = Documents.of(rows, device)
    return {
        "cu_seqlens_q": documents.offsets,
        "cu_seqlens_k": documents.offsets,
        "max_seqlen_q": documents.longest_tokens,
        "max_seqlen_k": documents.longest_tokens,
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": keys_to_the_left(window),
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Say why this backend cannot run there."""
    found = gpu_problems(machine, dtype, head_dim)
    missing = machine.lacks(PACKAGE, MINIMUM_VERSION)
    return found if missing is None else [*found, f"{missing} --no-build-isolation"]
