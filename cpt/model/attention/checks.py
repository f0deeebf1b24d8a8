"""Refusals of sink attention: arguments that ask for something else, or that contradict each other.

Every function here raises ValueError with the reason and what to do, and returns nothing.

Shape letters: B rows, S tokens of a row, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from cpt.model.attention.rows import PackedRows


def refuse_what_is_not_computed(
    attention_mask: torch.Tensor | None,
    dropout: float,
    s_aux: torch.Tensor | None,
    others: dict[str, Any],
) -> None:
    """Refuse a mask, dropout, missing sinks, and documents given in a way that is not read."""
    if s_aux is None:
        raise ValueError(
            "sink attention needs the sinks (s_aux). It serves gpt-oss layers, not attention "
            "without sinks."
        )
    if attention_mask is not None:
        raise ValueError(
            f"sink attention takes no mask, got one of shape {tuple(attention_mask.shape)}. "
            "Give documents by position_ids that restart, or by packed_rows."
        )
    if dropout != 0:
        raise ValueError(
            f"attention dropout is {dropout}, must be 0: folding in the sinks is exact only "
            "without it."
        )
    if others.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "sink attention does not read cu_seq_lens_q. Give documents by position_ids or "
            "packed_rows."
        )


def check_tensors(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, sinks_H: torch.Tensor
) -> None:
    """Refuse tensors whose shapes, dtypes or devices do not fit together."""
    _check_shapes(q_BHSD, k_BKSD, v_BKSD)
    num_heads = q_BHSD.shape[1]
    if sinks_H.shape != (num_heads,):
        raise ValueError(
            f"sinks have shape {tuple(sinks_H.shape)}, must be ({num_heads},): one per query head "
            "of this rank."
        )
    if not q_BHSD.dtype == k_BKSD.dtype == v_BKSD.dtype:
        raise ValueError(
            f"query, key and value differ in dtype: {q_BHSD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}."
        )
    devices = {x.device for x in (q_BHSD, k_BKSD, v_BKSD, sinks_H)}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise ValueError(f"query, key, value and sinks are on different devices: {names}.")


def _check_shapes(q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor) -> None:
    shapes = f"query {tuple(q_BHSD.shape)}, key {tuple(k_BKSD.shape)}, value {tuple(v_BKSD.shape)}"
    if not q_BHSD.ndim == k_BKSD.ndim == v_BKSD.ndim == 4 or k_BKSD.shape != v_BKSD.shape:
        raise ValueError(
            f"query, key and value must be (rows, heads, tokens, head size), got {shapes}."
        )
    batch_size, num_heads, num_queries, head_dim = q_BHSD.shape
    num_kv_heads, num_keys = k_BKSD.shape[1:3]
    if (batch_size, head_dim) != (k_BKSD.shape[0], k_BKSD.shape[3]):
        raise ValueError(f"query and key differ in rows or head size: {shapes}.")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} query heads.")
    if num_queries > num_keys:
        raise ValueError(
            f"{num_queries} queries meet {num_keys} keys: every query needs the key of its own "
            "token."
        )


def refuse_rows_with_a_cache(
    packed_rows: PackedRows | None, num_queries: int, num_keys: int
) -> None:
    """Refuse packed rows where a key/value cache holds more keys than there are queries."""
    if packed_rows is not None:
        raise ValueError(
            f"packed_rows with {num_queries} queries and {num_keys} keys: with a key/value cache, "
            "documents are given by position_ids. For training, call the model with "
            "use_cache=False."
        )


def check_rows(rows: PackedRows, batch_size: int, seq_len: int) -> None:
    """Refuse rows of another size than the tensors have."""
    if (rows.batch_size, rows.seq_len) != (batch_size, seq_len):
        raise ValueError(
            f"packed_rows describe {rows.batch_size} rows of {rows.seq_len} tokens, attention got "
            f"{batch_size} rows of {seq_len}. Under sequence parallelism they describe the whole "
            "rows, not the part of one rank."
        )
