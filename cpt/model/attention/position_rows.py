"""The documents that `position_ids` show, found by the first layer of a forward for all others.

The tensor of position ids is the one thing that all layers of a forward share and that goes when
the batch goes. So the documents are remembered for as long as that tensor lives, and found again
after it was changed in place.

Shape letters: B rows, S tokens of a row.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cpt.model.attention.rows import PackedRows

_found = WeakTensorKeyDictionary()
"""Position ids -> ((number of rows, version of the tensor), their documents)."""


def rows_of(position_ids: torch.Tensor | None, batch_size: int, seq_len: int) -> PackedRows:
    """Return the documents of `batch_size` rows; without position ids each row is one document.

    Args:
        position_ids: (B, S) or (1, S), the latter for all rows alike.
        batch_size: Number of rows.
        seq_len: Tokens of each row.

    Raises:
        ValueError: The position ids have another shape.
    """
    if position_ids is None:
        return PackedRows.from_bounds([(0, seq_len)] * batch_size, seq_len)
    _check_shape(position_ids, batch_size, seq_len)
    if position_ids.is_inference():  # has no version by which a change could be noticed
        return PackedRows.from_position_ids(position_ids.expand(batch_size, -1))
    state = (batch_size, position_ids._version)
    remembered = _found.get(position_ids)
    if remembered is not None and remembered[0] == state:
        rows: PackedRows = remembered[1]
        return rows
    rows = PackedRows.from_position_ids(position_ids.expand(batch_size, -1))
    _found[position_ids] = (state, rows)
    return rows


def _check_shape(position_ids: torch.Tensor, batch_size: int, seq_len: int) -> None:
    shape = tuple(position_ids.shape)
    if shape not in ((batch_size, seq_len), (1, seq_len)):
        raise ValueError(
            f"position_ids have shape {shape}, must be ({batch_size}, {seq_len}) or (1, {seq_len})."
        )
