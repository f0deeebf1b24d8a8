"""Documents of position ids are found once per tensor, and never mistaken for another's."""

from __future__ import annotations

import gc

import pytest
import torch

from cpt.model.attention import position_rows
from cpt.model.attention.position_rows import rows_of


def ids(*positions: int) -> torch.Tensor:
    return torch.tensor([positions])


def test_same_tensor_gives_the_same_rows_for_as_many_rows() -> None:
    position_ids = ids(0, 1, 0, 1)
    rows = rows_of(position_ids, 1, 4)
    assert rows_of(position_ids, 1, 4) is rows and rows.bounds == (0, 2, 4)
    assert rows_of(position_ids, 2, 4).bounds == (0, 2, 4, 6, 8)


def test_change_in_place_is_noticed() -> None:
    position_ids = ids(0, 1, 0, 1)
    assert rows_of(position_ids, 1, 4).bounds == (0, 2, 4)
    position_ids.copy_(ids(0, 1, 2, 0))
    assert rows_of(position_ids, 1, 4).bounds == (0, 3, 4)


def test_equal_and_later_tensors_are_told_apart() -> None:
    """Many tensors in a row reuse the memory, and thus the address, of those before them."""
    kept = ids(0, 1, 0, 1)
    assert rows_of(kept, 1, 4).bounds == (0, 2, 4)
    for first in range(1, 4):
        for _ in range(20):
            position_ids = torch.cat([torch.arange(first), torch.arange(4 - first)])[None]
            assert rows_of(position_ids, 1, 4).bounds == (0, first, 4)
            del position_ids
    assert rows_of(ids(0, 1, 0, 1), 1, 4) is not rows_of(kept, 1, 4)


def test_documents_are_forgotten_with_their_tensor() -> None:
    gc.collect()
    before = len(position_rows._found)
    position_ids = ids(0, 1, 2, 3)
    rows_of(position_ids, 1, 4)
    assert len(position_rows._found) == before + 1
    del position_ids
    gc.collect()
    assert len(position_rows._found) == before


def test_inference_tensor_is_read_each_time_as_its_changes_cannot_be_seen() -> None:
    with torch.inference_mode():
        position_ids = ids(0, 1, 0, 1)
        assert rows_of(position_ids, 1, 4).bounds == (0, 2, 4)
        position_ids.copy_(ids(0, 1, 2, 0))
        assert rows_of(position_ids, 1, 4).bounds == (0, 3, 4)


def test_without_position_ids_each_row_is_one_document() -> None:
    assert rows_of(None, 2, 3).bounds == (0, 3, 6)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\), must be \(2, 5\) or \(1, 5\)"):
        rows_of(ids(0, 1, 2, 3), 2, 5)
