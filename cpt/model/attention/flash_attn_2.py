"""FlashAttention 2 from the package flash-attn, with the sinks folded in (see function.py).

Decisions
    - The inner forward and backward functions are called, whose arguments include out and the
      log-sum-exp. The public `flash_attn_varlen_func` returns a log-sum-exp too, but its backward
      drops the gradient of it.
    - Everything after the tensors goes by keyword: the inner functions gained arguments between
      releases.

Source of the signatures: flash_attn/flash_attn_interface.py of flash-attn 2.8.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.machine import Machine
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
    """The `cpt.model.attention.interface.Kernel` of the package flash-attn."""

    def forward(
        self, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return out, lse, and a state of random numbers that the backward takes but never uses."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out_THD, lse_HT, _, rng_state = _flash_attn_varlen_forward(
            tokens_first(inputs.q_HTD),
            tokens_first(inputs.k_KTD),
            tokens_first(inputs.v_KTD),
            **_settings(inputs),
            return_softmax=False,
        )
        return tokens_first(out_THD), checked_lse(lse_HT, inputs.q_HTD, PACKAGE), (rng_state,)

    def backward(
        self,
        inputs: AttentionInputs,
        d_out_HTD: torch.Tensor,
        out_HTD: torch.Tensor,
        lse_HT: torch.Tensor,
        extra: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk and dv, which the kernel writes into tensors that it is given."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        q_THD = tokens_first(inputs.q_HTD)
        k_TKD = tokens_first(inputs.k_KTD)
        v_TKD = tokens_first(inputs.v_KTD)
        dq_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        dk_TKD = torch.empty_like(k_TKD, memory_format=torch.contiguous_format)
        dv_TKD = torch.empty_like(v_TKD, memory_format=torch.contiguous_format)
        _flash_attn_varlen_backward(
            tokens_first(d_out_HTD),
            q_THD,
            k_TKD,
            v_TKD,
            tokens_first(out_HTD),
            lse_HT.contiguous(),
            dq_THD,
            dk_TKD,
            dv_TKD,
            **_settings(inputs),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=extra[0],
        )
        return tokens_first(dq_THD), tokens_first(dk_TKD), tokens_first(dv_TKD)


def _settings(inputs: AttentionInputs) -> dict[str, Any]:
    """Return the arguments that forward and backward share."""
    documents = Documents.of(inputs)
    return {
        "cu_seqlens_q": documents.offsets,
        "cu_seqlens_k": documents.offsets,
        "max_seqlen_q": documents.longest_tokens,
        "max_seqlen_k": documents.longest_tokens,
        "dropout_p": 0.0,
        "softmax_scale": inputs.scale,
        "causal": True,
        "window_size_left": keys_to_the_left(inputs.window),
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return why this backend cannot run on a machine."""
    found = gpu_problems(machine, dtype, head_dim)
    missing = machine.lacks(PACKAGE, MINIMUM_VERSION)
    return found if missing is None else [*found, f"{missing} --no-build-isolation"]
