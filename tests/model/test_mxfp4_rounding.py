"""Rounding by bit patterns is the definition's rounding, for every kind of block."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cpt.config.precision_sections import ExponentRule
from cpt.model.weights import mxfp4, mxfp4_rounding
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from cpt.model.weights.mxfp4_rounding import round_by_bits
from tests.support.mxfp4_blocks import FIRST_NOT_FINITE, as_matrices, bits, hard_blocks

every_rule = pytest.mark.parametrize("rule", EXPONENT_RULES)


def agrees(values: torch.Tensor, rule: ExponentRule) -> bool:
    expected = mxfp4.rounded(values, rule)
    round_by_bits(values, rule, values)
    return torch.equal(bits(values), bits(expected))


@every_rule
def test_every_kind_of_block_is_rounded_as_the_definition_does(rule: ExponentRule) -> None:
    blocks = hard_blocks(300)
    largest = blocks.abs().amax(1)
    assert agrees(as_matrices(without_odd_blocks(blocks), 1), rule)
    assert agrees(as_matrices(blocks[largest < 2.0**-122], 1), rule)
    # those at the border in pieces without smaller ones
    at_border = (largest >= 2.0**-125) & (largest < 2.0**-122)
    assert agrees(as_matrices(blocks[at_border], 1), rule)


def without_odd_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Return the blocks that a piece may have without being left to the definition as a whole."""
    return blocks[blocks.abs().amax(1) >= 2.0**-122]


@pytest.mark.slow
@every_rule
def test_each_value_is_rounded_as_the_definition_does_below_each_largest_one(
    rule: ExponentRule,
) -> None:
    for seed in range(FIRST_NOT_FINITE // 1000):
        assert agrees(as_matrices(without_odd_blocks(hard_blocks(1000, seed)), 1), rule)


@every_rule
def test_blocks_of_normal_size_never_need_the_definition(
    rule: ExponentRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = mock.Mock(side_effect=AssertionError("it was asked"))
    monkeypatch.setattr(mxfp4, "rounded", definition)
    values = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))
    values[0, :32] = 0
    values[0, 32] = 2.0**-121
    values[1, 0] = 2.0**127
    round_by_bits(values, rule, values)


def test_matrices_are_rounded_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 96, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = mxfp4.rounded(values)
    monkeypatch.setattr(mxfp4_rounding, "PIECE_VALUES", 2 * 32 * 40)
    rounded_piece = mock.Mock(side_effect=mxfp4_rounding._rounded_piece)
    monkeypatch.setattr(mxfp4_rounding, "_rounded_piece", rounded_piece)
    round_by_bits(values, "floor", values)
    assert [len(call.args[0]) for call in rounded_piece.call_args_list] == [2, 2, 2, 2, 1]
    assert torch.equal(bits(values), bits(expected))
