"""flex_attention with sinks: slower than the flash kernels, but for float32, too, and no package.

Decisions
    - The output is multiplied by sigmoid(lse - sink) with the float32 log-sum-exp, and autograd
      goes through both: on CUDA, the backward of flex_attention takes the gradient of its
      log-sum-exp.
    - All rows go in as one, with documents in the mask. The blocks that a query block meets are
      found from the document starts, in numbers of blocks squared; torch's create_block_mask would
      evaluate all pairs of tokens.
    - The mask is built once per batch and window, and kept in PackedRows.

Source of the signatures: torch/nn/attention/flex_attention.py of torch 2.13.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size; Q
and U blocks of queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.machine import Machine
from cpt.model.attention.rows import PackedRows
from cpt.model.attention.varlen import HALF_TYPES, gpu_problems

BLOCK_TOKENS = 128
"""Tokens of the blocks that flex_attention skips or computes as a whole; its own default."""

SMALLEST_HEAD_DIM = 16


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Return flex_attention as a fused kernel; called plainly it builds all scores."""
    return torch.compile(flex_attention)


@dataclass(frozen=True, slots=True)
class Flex:
    """The `cpt.model.attention.interface.Attention` of flex_attention."""

    flex_function: Callable[[], Callable[..., Any]] = compiled_flex_attention
    """Returns flex_attention in the form that is to run."""

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        """Attend, multiplying by the factor of the sinks in float32 at least before rounding."""
        q_HTD, k_KTD, v_KTD, sinks_H, rows, window, scale = inputs
        device = q_HTD.device
        mask = rows.derive(("flex mask", window, device), lambda: block_mask(rows, window, device))
        out_1HTD, aux = self.flex_function()(
            q_HTD[None],
            k_KTD[None],
            v_KTD[None],
            block_mask=mask,
            scale=scale,
            enable_gqa=len(q_HTD) != len(k_KTD),
            return_aux=AuxRequest(lse=True),
        )
        lse_HT = aux.lse[0]
        factor_HT = torch.sigmoid(lse_HT - sinks_H.to(lse_HT.dtype).unsqueeze(1))
        return (out_1HTD[0] * factor_HT.unsqueeze(2)).to(q_HTD.dtype)


def block_mask(rows: PackedRows, window: int | None, device: torch.device) -> BlockMask:
    """Return which keys each query sees, as blocks to skip, to compute whole, and to mask."""
    num_tokens = rows.num_tokens
    document_T = rows.document_ids(device)

    def sees(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        same_document = document_T[query] == document_T[key]
        causal = query >= key
        if window is None:
            return same_document & causal
        return same_document & causal & (query - key < window)

    start_T = torch.tensor(rows.bounds, device=device)[document_T]
    first_query = torch.arange(0, num_tokens, BLOCK_TOKENS, device=device)
    last_query = (first_query + BLOCK_TOKENS - 1).clamp_max(num_tokens - 1)
    earliest_key = start_T[first_query]
    whole_from = start_T[last_query]
    if window is not None:
        earliest_key = earliest_key.maximum(first_query - window + 1)
        whole_from = whole_from.maximum(last_query - window + 1)
    # Document starts and windows only move on, so the first query of a block sees furthest back and
    # the last least far.
    meets_QU = (first_query <= first_query[:, None]) & (last_query >= earliest_key[:, None])
    whole_QU = (first_query < first_query[:, None]) & (first_query >= whole_from[:, None])
    partial_counts, partial_blocks = _ordered(meets_QU & ~whole_QU)
    whole_counts, whole_blocks = _ordered(whole_QU)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_blocks,
        whole_counts,
        whole_blocks,
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _ordered(chosen_QU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many key blocks each query block chose, and all key blocks, the chosen first."""
    counts_Q = chosen_QU.sum(1, dtype=torch.int32)
    order_QU = chosen_QU.int().argsort(dim=1, descending=True, stable=True).int()
    return counts_Q[None, None], order_QU[None, None]


def problems(machine: Machine, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return why this backend cannot run on a machine."""
    found = gpu_problems(machine, dtype, head_dim, dtypes=(*HALF_TYPES, torch.float32))
    if head_dim < SMALLEST_HEAD_DIM:
        found.append(f"head_dim {head_dim} is below {SMALLEST_HEAD_DIM}")
    if "triton" not in machine.packages:
        found.append(
            "package triton is not installed: pip install triton (CUDA builds of torch bring it)"
        )
    return found
