"""FlashAttention 4 (package flash-attn-4), which computes with sinks itself, forward and backward.

Decisions
    - The public `flash_attn_varlen_func` is called with `learnable_sink`; its autograd Function
      returns the sinks' gradient. torch's adapter for this package (torch.nn.attention._fa4, torch
      2.13) is not used: it has no sinks, and it expects two results where the package returns four
      or five.
    - Versions before 4.0.0b26 raise in the backward or lack it; GPUs other than SM9x, SM10x and
      SM11x have no backward for sinks. Both are refused here, before a run starts.
    - flash-attn 2.8 installs an early flash_attn/cute of its own. Where both packages are wanted,
      install flash-attn-4 last; the parity probe notices the wrong one.

Source of the signatures: flash_attn/cute/interface.py of flash-attn-4 4.0.0b26 and 4.0.0b36.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.machine import Machine
from cpt.model.attention.varlen import HALF_TYPES, Documents, gpu_problems, tokens_first

PACKAGE = "flash-attn-4"
MINIMUM_VERSION = "4.0.0b26"
MAJORS_WITH_SINK_BACKWARD = (9, 10, 11)
LARGEST_HEAD_DIM = 128
"""From here on SM100 has other kernels, one of them without sinks."""


@dataclass(frozen=True, slots=True)
class FlashAttn4:
    """The `cpt.model.attention.interface.Attention` of the package flash-attn-4."""

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        """Attend; sinks are read in their own dtype, float64 ones in float32."""
        from flash_attn.cute import flash_attn_varlen_func

        documents = Documents.of(inputs)
        window = (None, None) if inputs.window is None else (inputs.window - 1, 0)
        sinks_H = inputs.sinks_H
        if sinks_H.dtype not in (*HALF_TYPES, torch.float32):
            sinks_H = sinks_H.float()
        out_THD, _ = flash_attn_varlen_func(
            tokens_first(inputs.q_HTD),
            tokens_first(inputs.k_KTD),
            tokens_first(inputs.v_KTD),
            cu_seqlens_q=documents.offsets,
            cu_seqlens_k=documents.offsets,
            max_seqlen_q=documents.longest_tokens,
            max_seqlen_k=documents.longest_tokens,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=window,
            learnable_sink=sinks_H,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return tokens_first(out_THD)


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return why this backend cannot run on a machine."""
    found = gpu_problems(machine, dtype, head_dim, majors=MAJORS_WITH_SINK_BACKWARD)
    if head_dim > LARGEST_HEAD_DIM:
        found.append(
            f"head_dim {head_dim} is above {LARGEST_HEAD_DIM}, where not every kernel has sinks"
        )
    missing = machine.lacks(PACKAGE, MINIMUM_VERSION)
    return found if missing is None else [*found, missing]
