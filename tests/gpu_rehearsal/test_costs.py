"""The bytes of a tensor as a GPU moves them, and the scaling of few layers to all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.gpu_rehearsal.costs import stored_bytes
from tests.support.gpu_rehearsal.launch import whole_model
from tests.support.gpu_rehearsal.shapes import SHAPES

ROWS = torch.empty(512, 64, dtype=torch.bfloat16, device="meta")
WHOLE = 512 * 64 * 2


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (ROWS, WHOLE),
        (ROWS.t(), WHOLE),
        (ROWS[:, :32], WHOLE // 2),
        (ROWS[:, ::2], WHOLE),
        (ROWS[:, 0], 512 * 2),
        (ROWS[:0], 0),
        (ROWS[:1].expand(512, 64), 64 * 2),
        (torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")[:, 0], 4096 * 32),
    ],
    ids=[
        "whole",
        "transposed",
        "left half",
        "every second column",
        "few values",
        "no rows",
        "one row repeated",
        "one column in sectors",
    ],
)
def test_strided_columns_travel_in_whole_sectors(tensor: torch.Tensor, expected: int) -> None:
    assert stored_bytes(tensor) == expected


def quantities(launches: int) -> dict[str, dict[str, float]]:
    return {"forward": {"launches": launches, "seconds": launches / 10}}


def test_further_layers_cost_what_the_last_counted_ones_do() -> None:
    shape = replace(SHAPES[0], layers=4)
    few = {"experts": quantities(10), "loss head": quantities(7)}
    more = {"experts": quantities(16), "loss head": quantities(7), "new": quantities(2)}
    whole = whole_model(shape, few, more)
    turns = 24 // 2
    assert whole["experts"]["forward"]["launches"] == 10 + 6 * (turns - 1)
    assert whole["loss head"]["forward"]["launches"] == 7
    assert whole["new"]["forward"]["launches"] == 2 * (turns - 1)
    assert whole["experts"]["forward"]["seconds"] == pytest.approx(1.0 + 0.6 * (turns - 1))
