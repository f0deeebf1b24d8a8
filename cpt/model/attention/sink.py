"""Sink attention as transformers calls it: registration, the attention function, and its mask.

    sink_attention -> one rank has the row:      _attend
                      window layer with a halo:  _attend_with_halo
                      any other shared row:      _attend_with_exchange
                      decoding with a cache:     reference.cached_attention

Shape letters: B rows, S local tokens of a row, T tokens of a row on all ranks that share it, N all
tokens of the rows (flattened), L tokens of the halo's edge, H query heads, K key/value heads, D
head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from cpt.model.attention.checks import (
    check_rows,
    check_tensors,
    refuse_rows_with_a_cache,
    refuse_what_is_not_computed,
)
from cpt.model.attention.choice import AUTO, choose
from cpt.model.attention.interface import Attention, AttentionInputs, SequenceParallel
from cpt.model.attention.placement import edge_rows, local_rows
from cpt.model.attention.position_rows import rows_of
from cpt.model.attention.reference import cached_attention
from cpt.model.attention.rows import PackedRows
from cpt.parallel.halo import WindowHalo

NAME = "sink"
"""The name that transformers knows this attention by, as `attn_implementation`."""


def register() -> str:
    """Make `attn_implementation="sink"` work on gpt-oss models of transformers (5.17 to 5.23).

    A mask function goes with it: for an attention without one, transformers drops a 2-D mask
    silently.

    Returns:
        The name to give as `attn_implementation`.
    """
    AttentionInterface.register(NAME, sink_attention)
    AttentionMaskInterface.register(NAME, sink_mask)
    return NAME


class _Layer(NamedTuple):
    """One call of the attention function: tensors with a row dimension, and who computes."""

    q_BHSD: torch.Tensor
    k_BKSD: torch.Tensor
    v_BKSD: torch.Tensor
    sinks_H: torch.Tensor
    window: int | None
    scale: float
    attention: Attention


def sink_attention(
    module: nn.Module,
    query_BHSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    packed_rows: PackedRows | None = None,
    sequence_parallel: SequenceParallel | None = None,
    kernel: str | Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally with sinks within the documents of packed rows.

    transformers calls this in every layer. `packed_rows`, `sequence_parallel` and `kernel` are
    keyword arguments of the model's call, which transformers passes on.

    Args:
        module: The attention layer, unused.
        query_BHSD: Queries.
        key_BKSD: Keys. More keys than queries mean decoding with a cache: the last query belongs to
            the last key.
        value_BKSD: Values.
        attention_mask: Must be None.
        scaling: Factor on q k^T.
        dropout: Must be 0.
        sliding_window: None, or the number of keys that a query sees: itself and those before it.
        s_aux: The sinks, one logit per query head.
        position_ids: (B, S) or (1, S). A document starts where a position is not its predecessor
            plus one.
        packed_rows: The documents, in place of `position_ids`.
        sequence_parallel: The exchange among the ranks of a row; needs `packed_rows` of the whole
            row.
        kernel: The name of a backend, or an implementation; "auto" if None.
        **kwargs: Further arguments of transformers, unused.

    Returns:
        The output (B, S, H, D), and None for the attention probabilities.

    Raises:
        ValueError: The arguments ask for something else than the above, or contradict each other.
    """
    refuse_what_is_not_computed(attention_mask, dropout, s_aux, kwargs)
    assert s_aux is not None
    layer = _Layer(
        query_BHSD,
        key_BKSD,
        value_BKSD,
        s_aux,
        sliding_window,
        scaling,
        _implementation(kernel, query_BHSD),
    )
    if sequence_parallel is not None:
        return _attend_in_parallel(layer, sequence_parallel, packed_rows), None
    check_tensors(query_BHSD, key_BKSD, value_BKSD, s_aux)
    batch_size, _, seq_len, _ = query_BHSD.shape
    num_keys = key_BKSD.shape[2]
    if num_keys != seq_len:
        refuse_rows_with_a_cache(packed_rows, seq_len, num_keys)
        out_BHSD = cached_attention(
            query_BHSD, key_BKSD, value_BKSD, s_aux, position_ids, sliding_window, scaling
        )
        return out_BHSD.transpose(1, 2).contiguous(), None
    if packed_rows is None:
        packed_rows = rows_of(position_ids, batch_size, seq_len)
    return _attend(layer, packed_rows), None


def _implementation(kernel: str | Attention | None, query: torch.Tensor) -> Attention:
    if kernel is not None and not isinstance(kernel, str):
        return kernel
    return choose(kernel or AUTO, device=query.device, dtype=query.dtype, head_dim=query.shape[-1])


def _attend(layer: _Layer, rows: PackedRows) -> torch.Tensor:
    """Run the implementation on whole rows; return (B, S, H, D)."""
    check_tensors(layer.q_BHSD, layer.k_BKSD, layer.v_BKSD, layer.sinks_H)
    batch_size, _, seq_len, _ = layer.q_BHSD.shape
    check_rows(rows, batch_size, seq_len)
    out_HND = layer.attention(
        AttentionInputs(
            q_HTD=_flattened(layer.q_BHSD),
            k_KTD=_flattened(layer.k_BKSD),
            v_KTD=_flattened(layer.v_BKSD),
            sinks_H=layer.sinks_H,
            rows=rows,
            window=layer.window,
            scale=layer.scale,
        )
    )
    return torch.unflatten(out_HND.transpose(0, 1), 0, (batch_size, seq_len))


def _flattened(x_BHSD: torch.Tensor) -> torch.Tensor:
    """Return (H, N, D)."""
    return x_BHSD.transpose(0, 1).flatten(1, 2)


def _attend_in_parallel(
    layer: _Layer, exchange: SequenceParallel, packed_rows: PackedRows | None
) -> torch.Tensor:
    """Attend over rows of which this rank holds a part; return (B, S, H, D)."""
    if packed_rows is None:
        raise ValueError(
            "sequence_parallel needs packed_rows of the whole rows: position_ids show a part of "
            "them."
        )
    halo = exchange.halo
    if halo is not None and halo.window == layer.window:
        return _attend_with_halo(layer, halo, packed_rows)
    return _attend_with_exchange(layer, exchange, packed_rows)


def _attend_with_halo(layer: _Layer, halo: WindowHalo, rows: PackedRows) -> torch.Tensor:
    """Attend within the local tokens while the neighbor's keys travel, then redo the edge."""
    pending = halo.start(layer.k_BKSD, layer.v_BKSD)
    local_BSHD = _attend(layer, local_rows(rows, halo))
    query, key, value = halo.edge(pending, layer.q_BHSD, layer.k_BKSD, layer.v_BKSD)
    edge_BLHD = _attend(
        layer._replace(q_BHSD=query, k_BKSD=key, v_BKSD=value), edge_rows(rows, halo)
    )
    return halo.join(edge_BLHD, local_BSHD)


def _attend_with_exchange(
    layer: _Layer, exchange: SequenceParallel, rows: PackedRows
) -> torch.Tensor:
    """Attend with all tokens and the heads of this rank, then return to its own tokens.

    While one group of heads is computed, the next one arrives and the one before returns.
    """
    groups = range(exchange.head_groups)
    arriving = []
    for group in groups:
        arriving.append(exchange.start_qkv(layer.q_BHSD, layer.k_BKSD, layer.v_BKSD, group))
    returning = []
    for group in groups:
        query, key, value = arriving[group].finish()
        sinks = exchange.local_sinks(layer.sinks_H, group)
        whole = layer._replace(q_BHSD=query, k_BKSD=key, v_BKSD=value, sinks_H=sinks)
        returning.append(exchange.start_out(_attend(whole, rows)))
    return exchange.join_out(returning)


def sink_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Build no mask, and refuse what would need one.

    transformers calls this once per forward and kind of layer.

    Raises:
        ValueError: The 2-D mask hides tokens, or the cache has room for tokens that are not there
            yet.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        hidden = int((attention_mask == 0).sum())
        raise ValueError(
            f"attention_mask hides {hidden} of {attention_mask.numel()} tokens, but sink attention "
            "takes no mask. For training, leave the mask out and let position_ids restart at each "
            "document and at the padding, which then is a document of its own. For generation, use "
            "prompts of one length."
        )
    num_queries = int(q_offset) + q_length
    num_keys = kv_offset + kv_length
    if num_queries != num_keys:
        raise ValueError(
            f"the cache holds {num_keys} tokens while the last query is token {num_queries - 1}: a "
            "static cache, which sink attention cannot read. Use a dynamic one."
        )
