"""FlashAttention 2 inside torch: the kernel that needs no package beside a CUDA build of torch.

Decisions
    - The operator is called directly. torch.nn.attention.varlen.varlen_attn is a wrapper around it
      whose backward drops the gradient of the log-sum-exp (torch 2.13). Here out and lse are folded
      with the sinks and handed to the operator's backward; see `cpt.model.attention.function`.
    - The window to the right is always 0 and not only implied by `is_causal`: the kernel forgets
      `is_causal` when no document is longer than one token, and then changes the layout of its
      log-sum-exp.
    - The kernel writes dk and dv per query head and sums the heads of a group in float32.

Source of the signatures: aten/src/ATen/native/native_functions.yaml of torch 2.13.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

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

DROPOUT = 0.0
IS_CAUSAL = True
RETURN_DEBUG_MASK = False


@dataclass(frozen=True, slots=True)
class TorchFlashKernel:
    """The `cpt.model.attention.interface.Kernel` inside torch, for GPUs from SM80 on."""

    def forward(
        self, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return out, lse, and a state of random numbers that the backward takes but never uses."""
        documents = Documents.of(inputs)
        longest = documents.longest_tokens
        out_THD, lse_HT, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            tokens_first(inputs.q_HTD),
            tokens_first(inputs.k_KTD),
            tokens_first(inputs.v_KTD),
            documents.offsets,
            documents.offsets,
            longest,
            longest,
            DROPOUT,
            IS_CAUSAL,
            RETURN_DEBUG_MASK,
            scale=inputs.scale,
            window_size_left=keys_to_the_left(inputs.window),
            window_size_right=0,
        )
        lse_HT = checked_lse(lse_HT, inputs.q_HTD, f"torch {torch.__version__}")
        return tokens_first(out_THD), lse_HT, (rng_state, unused)

    def backward(
        self,
        inputs: AttentionInputs,
        d_out_HTD: torch.Tensor,
        out_HTD: torch.Tensor,
        lse_HT: torch.Tensor,
        extra: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk and dv."""
        documents = Documents.of(inputs)
        longest = documents.longest_tokens
        rng_state, unused = extra
        dq_THD, dk_TKD, dv_TKD = torch.ops.aten._flash_attention_backward(
            tokens_first(d_out_HTD),
            tokens_first(inputs.q_HTD),
            tokens_first(inputs.k_KTD),
            tokens_first(inputs.v_KTD),
            tokens_first(out_HTD),
            lse_HT.contiguous(),
            documents.offsets,
            documents.offsets,
            longest,
            longest,
            DROPOUT,
            IS_CAUSAL,
            rng_state,
            unused,
            scale=inputs.scale,
            window_size_left=keys_to_the_left(inputs.window),
            window_size_right=0,
        )
        return tokens_first(dq_THD), tokens_first(dk_TKD), tokens_first(dv_TKD)


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return why this backend cannot run on a machine."""
    found = gpu_problems(machine, dtype, head_dim)
    if machine.compute_capability is not None and not machine.torch_has_flash:
        found.append(
            f"torch {machine.torch_build} is built without FlashAttention: install a wheel from "
            "pytorch.org"
        )
    return found
