"""FlashAttention 2 inside torch: the kernel that needs no package beside a CUDA build of torch.

Decisions
    The operator is called directly. torch.nn.attention.varlen.varlen_attn is a wrapper around it
    whose backward drops the gradient of the log-sum-exp (torch 2.13); here out and lse are folded
    with the sinks and handed to the operator's backward, see `cpt.model.attention.function`.
    The window to the right is 0 always and not only implied by `is_causal`: the kernel forgets
    `is_causal` when no document is longer than one token, and then changes the layout of its
    log-sum-exp. The kernel writes dk and dv per query head and sums the heads of a group in
    float32.

Source of the signatures: aten/src/ATen/native/native_functions.yaml of torch 2.13.

Shape suffixes: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass

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

DROPOUT = 0.0
IS_CAUSAL = True
RETURN_DEBUG_MASK = False


@dataclass(frozen=True, slots=True)
class TorchFlashKernel:
    """The `cpt.model.attention.function.Kernel` inside torch, for GPUs from SM80 on."""

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
        documents = Documents.of(rows, q_HTD.device)
        longest = documents.longest_tokens
        out_THD, lse_HT, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            *map(tokens_first, (q_HTD, k_KTD, v_KTD)),
            documents.offsets,
            documents.offsets,
            longest,
            longest,
            DROPOUT,
            IS_CAUSAL,
            RETURN_DEBUG_MASK,
            scale=scale,
            window_size_left=keys_to_the_left(window),
            window_size_right=0,
        )
        return (
            tokens_first(out_THD),
            checked_lse(lse_HT, q_HTD, f"torch {torch.__version__}"),
            (rng_state, unused),
        )

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
        """Return dq, dk and dv."""
        documents = Documents.of(rows, q_HTD.device)
        longest = documents.longest_tokens
        rng_state, unused = extra
        gradients = torch.ops.aten._flash_attention_backward(
            *map(tokens_first, (d_out_HTD, q_HTD, k_KTD, v_KTD, out_HTD)),
            lse_HT.contiguous(),
            documents.offsets,
            documents.offsets,
            longest,
            longest,
            DROPOUT,
            IS_CAUSAL,
            rng_state,
            unused,
            scale=scale,
            window_size_left=keys_to_the_left(window),
            window_size_right=0,
        )
        dq_HTD, dk_KTD, dv_KTD = map(tokens_first, gradients)
        return dq_HTD, dk_KTD, dv_KTD


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Say why this backend cannot run there."""
    found = gpu_problems(machine, dtype, head_dim)
    if machine.compute_capability is not None and not machine.torch_has_flash:
        found.append(
            f"torch {machine.torch_build} is built without FlashAttention: install a wheel from pytorch.org"
        )
    return found
