"""Sink attention for gpt-oss: the function that transformers calls, and what stands behind it.

    register()                          makes attn_implementation="sink" known to transformers
    sink_attention(...)                 flatten rows -> choose() -> an Attention -> restore rows
      rows.py       PackedRows          the documents of a micro batch
      choice.py     choose()            the table of backends
      function.py   SinkAttention       folds the sinks into any flash kernel, exact in every gradient
      cpu.py        CpuKernel           one such kernel
      reference.py  reference_attention the definition, and decoding with a key/value cache

Documents are given by `position_ids` that restart, or by `packed_rows`; never by a mask.

Shape suffixes: B rows, S tokens of a row on this rank, T tokens of a row on all ranks of a
sequence-parallel group, N all tokens of the rows (flattened), H query heads, K key/value heads, D
head size.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cpt.model.attention.choice import AUTO, choose, known_names
from cpt.model.attention.function import Attention, FoldedSinks, Kernel, SinkAttention
from cpt.model.attention.reference import cached_attention, reference_attention
from cpt.model.attention.rows import PackedRows
from cpt.parallel.halo import WindowHalo

__all__ = [
    "AUTO",
    "NAME",
    "Attention",
    "FoldedSinks",
    "Kernel",
    "PackedRows",
    "SequenceParallel",
    "SinkAttention",
    "choose",
    "known_names",
    "reference_attention",
    "register",
    "sink_attention",
    "sink_mask",
]

NAME = "sink"
"""What to give transformers as `attn_implementation`."""


class SequenceParallel(Protocol):
    """Exchanges tokens for heads among the ranks that share a row (DeepSpeed-Ulysses,
    arXiv:2309.14509).
    """

    def exchange_qkv(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same with all T tokens and the heads of this rank."""

    def local_sinks(self, sinks_H: Tensor) -> Tensor:
        """Return the sinks of the query heads of this rank."""

    def exchange_out(self, out_BTHD: Tensor) -> Tensor:
        """Return the output with all heads and the tokens of this rank, (B, S, H, D)."""

    @property
    def halo(self) -> WindowHalo | None:
        """The cheaper exchange for layers of its window, or None."""


def register() -> str:
    """Make `attn_implementation="sink"` work on gpt-oss models of transformers (5.17 to 5.23);
    return the name.

    A mask function goes with it: for an attention without one transformers drops a 2-D mask without
    a word.
    """
    AttentionInterface.register(NAME, sink_attention)
    AttentionMaskInterface.register(NAME, sink_mask)
    return NAME


def sink_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    packed_rows: PackedRows | None = None,
    sequence_parallel: SequenceParallel | None = None,
    kernel: str | Attention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally with sinks, in the documents of packed rows; transformers calls this in every
    layer.

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
        position_ids: (B, S) or (1, S); a document starts where a position is not its predecessor
            plus one.
        packed_rows: The documents, in place of `position_ids`. A keyword argument of the model's
            call.
        sequence_parallel: Exchange among the ranks of a row; needs `packed_rows` of the whole row.
            A keyword argument of the model's call.
        kernel: Name of a backend or an implementation, "auto" if None. A keyword argument of the
            model's call.
        **kwargs: What else transformers passes on, unused.

    Returns:
        The output (B, S, H, D), and None for the attention probabilities.

    Raises:
        ValueError: The arguments ask for something else than the above, or contradict each other.
    """
    sinks_H = _checked_sinks(s_aux)
    _refuse_what_is_not_computed(attention_mask, dropout, kwargs)
    if kernel is None or isinstance(kernel, str):
        kernel = choose(
            kernel or AUTO,
            device=query_BHSD.device,
            dtype=query_BHSD.dtype,
            head_dim=query_BHSD.shape[-1],
        )
    attend = partial(_attend, window=sliding_window, scaling=scaling, kernel=kernel)
    if sequence_parallel is not None:
        if packed_rows is None:
            raise ValueError(
                "sequence_parallel needs packed_rows of the whole rows: position_ids show a part of them."
            )
        halo = sequence_parallel.halo
        if halo is not None and halo.window == sliding_window:
            pending = halo.start(key_BKSD, value_BKSD)
            local_rows = packed_rows.derive(("local rows",), lambda: halo.local_rows(packed_rows))
            local_BSHD = attend(query_BHSD, key_BKSD, value_BKSD, sinks_H, local_rows)
            edge_rows = packed_rows.derive(
                ("edge rows", sliding_window), lambda: halo.edge_rows(packed_rows)
            )
            edge_BLHD = attend(
                *halo.edge(pending, query_BHSD, key_BKSD, value_BKSD), sinks_H, edge_rows
            )
            return halo.join(edge_BLHD, local_BSHD), None
        query, key, value = sequence_parallel.exchange_qkv(query_BHSD, key_BKSD, value_BKSD)
        out_BTHD = attend(query, key, value, sequence_parallel.local_sinks(sinks_H), packed_rows)
        return sequence_parallel.exchange_out(out_BTHD), None
    _check_tensors(query_BHSD, key_BKSD, value_BKSD, sinks_H)
    batch_size, _, seq_len, _ = query_BHSD.shape
    if key_BKSD.shape[2] != seq_len:
        _refuse_rows_with_a_cache(packed_rows, seq_len, key_BKSD.shape[2])
        out_BHSD = cached_attention(
            query_BHSD, key_BKSD, value_BKSD, sinks_H, position_ids, sliding_window, scaling
        )
        return out_BHSD.transpose(1, 2).contiguous(), None
    rows = packed_rows if packed_rows is not None else _rows_of(position_ids, batch_size, seq_len)
    return attend(query_BHSD, key_BKSD, value_BKSD, sinks_H, rows), None


def _attend(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    sinks_H: Tensor,
    rows: PackedRows,
    *,
    window: int | None,
    scaling: float,
    kernel: Attention,
) -> Tensor:
    """Run a backend on rows; (B, T, H, D)."""
    _check_tensors(query_BHTD, key_BKTD, value_BKTD, sinks_H)
    batch_size, _, seq_len, _ = query_BHTD.shape
    _check_rows(rows, batch_size, seq_len)
    q_HND, k_KND, v_KND = (
        x.transpose(0, 1).flatten(1, 2) for x in (query_BHTD, key_BKTD, value_BKTD)
    )
    out_HND = kernel(q_HND, k_KND, v_KND, sinks_H, rows, window, scaling)
    return torch.unflatten(out_HND.transpose(0, 1), 0, (batch_size, seq_len))


def sink_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Build no mask, and refuse what would need one; transformers calls this once per forward and
    kind of layer.

    Raises:
        ValueError: The 2-D mask hides tokens, or the cache has room for tokens that are not there
            yet.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        hidden = int((attention_mask == 0).sum())
        raise ValueError(
            f"attention_mask hides {hidden} of {attention_mask.numel()} tokens, but sink attention takes no mask. "
            "For training, leave the mask out and let position_ids restart at each document and at the padding, "
            "which then is a document of its own. For generation, use prompts of one length."
        )
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError(
            f"the cache holds {kv_offset + kv_length} tokens while the last query is token "
            f"{int(q_offset) + q_length - 1}: a static cache, which sink attention cannot read. Use a dynamic one."
        )


def _checked_sinks(s_aux: Tensor | None) -> Tensor:
    if s_aux is None:
        raise ValueError(
            "sink attention needs the sinks (s_aux). It serves gpt-oss layers, not attention without sinks."
        )
    return s_aux


def _refuse_what_is_not_computed(
    attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"sink attention takes no mask, got one of shape {tuple(attention_mask.shape)}. "
            "Give documents by position_ids that restart, or by packed_rows."
        )
    if dropout != 0:
        raise ValueError(
            f"attention dropout is {dropout}, must be 0: folding in the sinks is exact only without it."
        )
    if others.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "sink attention does not read cu_seq_lens_q. Give documents by position_ids or packed_rows."
        )


def _check_tensors(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, sinks_H: Tensor) -> None:
    shapes = f"query {tuple(q_BHSD.shape)}, key {tuple(k_BKSD.shape)}, value {tuple(v_BKSD.shape)}"
    if any(x.ndim != 4 for x in (q_BHSD, k_BKSD, v_BKSD)) or k_BKSD.shape != v_BKSD.shape:
        raise ValueError(
            f"query, key and value must be (rows, heads, tokens, head size), got {shapes}."
        )
    batch_size, num_heads, seq_len, head_dim = q_BHSD.shape
    num_kv_heads = k_BKSD.shape[1]
    if (batch_size, head_dim) != (k_BKSD.shape[0], k_BKSD.shape[3]):
        raise ValueError(f"query and key differ in rows or head size: {shapes}.")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} query heads.")
    if seq_len > k_BKSD.shape[2]:
        raise ValueError(
            f"{seq_len} queries meet {k_BKSD.shape[2]} keys: every query needs the key of its own token."
        )
    if sinks_H.shape != (num_heads,):
        raise ValueError(
            f"sinks have shape {tuple(sinks_H.shape)}, must be ({num_heads},): one per query head of this rank."
        )
    if not q_BHSD.dtype == k_BKSD.dtype == v_BKSD.dtype:
        raise ValueError(
            f"query, key and value differ in dtype: {q_BHSD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}."
        )
    if len(devices := {x.device for x in (q_BHSD, k_BKSD, v_BKSD, sinks_H)}) > 1:
        raise ValueError(
            f"query, key, value and sinks are on different devices: {sorted(map(str, devices))}."
        )


def _refuse_rows_with_a_cache(
    packed_rows: PackedRows | None, num_queries: int, num_keys: int
) -> None:
    if packed_rows is not None:
        raise ValueError(
            f"packed_rows with {num_queries} queries and {num_keys} keys: with a key/value cache, documents are given "
            "by position_ids. For training, call the model with use_cache=False."
        )


def _check_rows(rows: PackedRows, batch_size: int, seq_len: int) -> None:
    if (rows.batch_size, rows.seq_len) != (batch_size, seq_len):
        raise ValueError(
            f"packed_rows describe {rows.batch_size} rows of {rows.seq_len} tokens, attention got {batch_size} rows of "
            f"{seq_len}. Under sequence parallelism they describe the whole rows, not the part of one rank."
        )


def _rows_of(position_ids: Tensor | None, batch_size: int, seq_len: int) -> PackedRows:
    """Return the documents that `position_ids` show, found by the first layer and kept on the
    tensor for the others.

    The tensor is the one thing that all layers of a forward share and that dies with the batch.
    """
    if position_ids is None:
        return PackedRows.from_bounds([(0, seq_len)] * batch_size, seq_len)
    if (
        position_ids.ndim != 2
        or position_ids.shape[0] not in (1, batch_size)
        or position_ids.shape[1] != seq_len
    ):
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}, must be ({batch_size}, {seq_len}) or (1, {seq_len})."
        )
    version = None if position_ids.is_inference() else position_ids._version
    key = (batch_size, version)
    kept: tuple[tuple[int, int | None], PackedRows] | None = getattr(
        position_ids, "_cpt_packed_rows", None
    )
    if kept is not None and kept[0] == key and version is not None:
        return kept[1]
    rows = PackedRows.from_position_ids(position_ids.expand(batch_size, -1))
    position_ids._cpt_packed_rows = (key, rows)  # type: ignore[attr-defined]
    return rows
