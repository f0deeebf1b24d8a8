"""Sink attention by its definition: an explicit softmax with one more column.

Autograd differentiates it. It is the yardstick for every other implementation, and the path of
decoding with a key/value cache, where a few queries meet many keys. Memory grows with the square of
the row.

Source of the maths: `eager_attention_forward` in transformers' modeling_gpt_oss.py. In contrast to
it the softmax is taken in float32 at least, and documents are kept apart.

Shape letters: B rows, S queries of a row, U keys of a row, T tokens of all rows (flattened), H
query heads, K key/value heads, G query heads per key/value head, D head size.
"""

from __future__ import annotations

import torch

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.rows import PackedRows


def reference_attention(inputs: AttentionInputs) -> torch.Tensor:
    """Attend within the documents of packed rows; an `Attention` of the table of backends."""
    rows = inputs.rows
    device = inputs.q_HTD.device
    document_BS = rows.document_ids(device).view(rows.batch_size, rows.seq_len)
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    distance_SS = _distance(rows.seq_len, rows.seq_len, device)
    out_BHSD = explicit_attention(
        _in_rows(inputs.q_HTD, rows),
        _in_rows(inputs.k_KTD, rows),
        _in_rows(inputs.v_KTD, rows),
        inputs.sinks_H,
        _in_window(distance_SS, inputs.window) & same_BSS,
        inputs.scale,
    )
    return out_BHSD.transpose(0, 1).flatten(1, 2)


def _in_rows(x_HTD: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Return (B, H, S, D)."""
    return torch.unflatten(x_HTD, 1, (rows.batch_size, rows.seq_len)).transpose(0, 1)


def cached_attention(
    q_BHSD: torch.Tensor,
    k_BKUD: torch.Tensor,
    v_BKUD: torch.Tensor,
    sinks_H: torch.Tensor,
    position_ids_BS: torch.Tensor | None,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attend from the last S tokens of a row to the last U keys that a cache has kept of it.

    Args:
        q_BHSD: Queries, the last of which belongs to the same token as the last key.
        k_BKUD: Keys, cropped at the front or not.
        v_BKUD: Values.
        sinks_H: One logit per query head.
        position_ids_BS: Position of each query in its document, shape (B, S) or (1, S). A query
            sees that many keys before itself and no more, so documents packed into the cached part
            stay apart. None: one document.
        window: None, or the number of keys a query sees, itself included.
        scale: Factor on q k^T.
    """
    distance_SU = _distance(q_BHSD.shape[2], k_BKUD.shape[2], q_BHSD.device)
    allowed_BSU = _in_window(distance_SU, window).unsqueeze(0)
    if position_ids_BS is not None:
        allowed_BSU = allowed_BSU & (distance_SU <= position_ids_BS.unsqueeze(2))
    return explicit_attention(q_BHSD, k_BKUD, v_BKUD, sinks_H, allowed_BSU, scale)


def explicit_attention(
    q_BHSD: torch.Tensor,
    k_BKUD: torch.Tensor,
    v_BKUD: torch.Tensor,
    sinks_H: torch.Tensor,
    allowed_BSU: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return softmax([scale q k^T, sink]) v without the sink's column.

    The shape is (B, H, S, D), the dtype that of q.

    Args:
        q_BHSD: Queries.
        k_BKUD: Keys; K divides H.
        v_BKUD: Values.
        sinks_H: One logit per query head.
        allowed_BSU: True where the query sees the key; its first dimension may be 1.
        scale: Factor on q k^T.
    """
    dtype = torch.promote_types(q_BHSD.dtype, torch.float32)
    num_kv_heads = k_BKUD.shape[1]
    q_BKGSD = torch.unflatten(q_BHSD.to(dtype), 1, (num_kv_heads, -1))
    k_BK1DU = k_BKUD.to(dtype).transpose(2, 3).unsqueeze(2)
    scores_BKGSU = (q_BKGSD @ k_BK1DU * scale).masked_fill(~allowed_BSU[:, None, None], -torch.inf)
    sinks_KG11 = sinks_H.to(dtype).view(num_kv_heads, -1, 1, 1)
    column_BKGS1 = sinks_KG11.expand(*scores_BKGSU.shape[:1], -1, -1, scores_BKGSU.shape[3], -1)
    probability_BKGSU = torch.cat([scores_BKGSU, column_BKGS1], dim=-1).softmax(-1)[..., :-1]
    out_BKGSD = probability_BKGSU @ v_BKUD.to(dtype).unsqueeze(2)
    return out_BKGSD.flatten(1, 2).to(q_BHSD.dtype)


def _distance(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return how many tokens key j lies before query i, (S, U); both end with the same token."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)
    return query[:, None] - torch.arange(num_keys, device=device)


def _in_window(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    causal = distance >= 0
    if window is None:
        return causal
    return causal & (distance < window)
