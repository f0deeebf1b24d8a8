"""Attention of one query a row against the keys that a cache holds of the row.

It is the definition of cpt/model/attention/reference.py for a single query: the query heads of a
group take the place of the queries, so keys and values are read once for all of them.

Shape letters: B rows, H query heads, K key/value heads, G query heads per key/value head, U slots
of the cache, D head size.
"""

from __future__ import annotations

import torch


def decoding_attention(
    q_BHD: torch.Tensor,
    k_BKUD: torch.Tensor,
    v_BKUD: torch.Tensor,
    sinks_H: torch.Tensor,
    allowed_BU: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return softmax([scale q k^T, sink]) v without the sink's column, (B, H, D).

    The softmax is taken in float32 at least; the result has the dtype of the queries.

    Args:
        q_BHD: Queries, rotated.
        k_BKUD: Keys, rotated, in any order of their positions; K divides H.
        v_BKUD: Values, in the same order.
        sinks_H: One logit per query head, not scaled.
        allowed_BU: True where the query sees the key; each row sees one at least.
        scale: Factor on q k^T.
    """
    dtype = torch.promote_types(q_BHD.dtype, torch.float32)
    num_kv_heads = k_BKUD.shape[1]
    q_BKGD = torch.unflatten(q_BHD.to(dtype), 1, (num_kv_heads, -1))
    scores_BKGU = q_BKGD @ k_BKUD.to(dtype).transpose(2, 3) * scale
    scores_BKGU = scores_BKGU.masked_fill(~allowed_BU[:, None, None], -torch.inf)
    sinks_KG1 = sinks_H.to(dtype).view(num_kv_heads, -1, 1)
    column_BKG1 = sinks_KG1.expand(scores_BKGU.shape[0], -1, -1, -1)
    probability_BKGU = torch.cat([scores_BKGU, column_BKG1], dim=-1).softmax(-1)[..., :-1]
    return (probability_BKGU @ v_BKUD.to(dtype)).flatten(1, 2).to(q_BHD.dtype)
