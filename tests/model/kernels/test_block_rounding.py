"""The kernel and the operator that round to MXFP4 give what the definition gives, bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cpt.config.precision_sections import ExponentRule
from cpt.model.kernels import block_rounding
from cpt.model.kernels.block_rounding import round_blocks, round_blocks_, round_into
from cpt.model.weights import mxfp4
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from tests.support.expert_inputs import every_dtype
from tests.support.mxfp4_blocks import as_matrices, bits, hard_blocks

every_rule = pytest.mark.parametrize("rule", EXPONENT_RULES)

SHAPES = {
    "whole tiles": (2, 64, 64),
    "outputs beside a tile": (1, 96, 70),
    "less than a tile": (1, 32, 3),
    "no experts": (0, 64, 8),
}
"""Experts, inputs and outputs."""


def launched(values: torch.Tensor, rule: ExponentRule, dtype: torch.dtype) -> torch.Tensor:
    from cpt.model.kernels import triton_block_rounding

    out = torch.empty_like(values, dtype=dtype)
    triton_block_rounding.round_values(values, rule, out)
    return out


@every_rule
def test_kernel_rounds_every_kind_of_block_as_the_definition(
    rule: ExponentRule, kernel_device: torch.device
) -> None:
    values = as_matrices(hard_blocks(10), 1024)
    found = launched(values.to(kernel_device), rule, torch.bfloat16)
    assert torch.equal(bits(found), bits(mxfp4.rounded(values, rule)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_rounds_matrices_of_any_width(
    shape: tuple[int, int, int], kernel_device: torch.device
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = launched(values.to(kernel_device), "floor", torch.bfloat16)
    assert torch.equal(bits(found), bits(mxfp4.rounded(values, "floor")))


@every_dtype
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_reads_and_writes_both_dtypes(
    dtype: torch.dtype, written: torch.dtype, kernel_device: torch.device
) -> None:
    values = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = launched(values.to(kernel_device), "floor", written)
    assert torch.equal(bits(found), bits(mxfp4.rounded(values, "floor").to(written)))


@every_rule
@every_dtype
def test_operator_rounds_in_place_and_into_others_as_the_definition(
    rule: ExponentRule, dtype: torch.dtype
) -> None:
    values = as_matrices(hard_blocks(10), 96).to(dtype)
    expected = bits(mxfp4.rounded(values, rule))
    assert torch.equal(bits(round_blocks(values, rule)), expected)
    out = torch.empty_like(values)
    round_into(values, rule, out)
    assert torch.equal(bits(out), expected)
    round_blocks_(values, rule)
    assert torch.equal(bits(values), expected)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@every_rule
def test_block_that_is_not_finite_stays_so_and_touches_no_other(
    rule: ExponentRule, wrong: float, kernel_device: torch.device
) -> None:
    values = torch.randn(2, 64, 70, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = mxfp4.rounded(values, rule)
    values[1, 33, 69] = wrong
    for found in (
        launched(values.to(kernel_device), rule, values.dtype),
        round_blocks(values, rule),
    ):
        finite = found.cpu().isfinite()
        assert not finite[1, 32:, 69].any()
        finite[1, 32:, 69] = True
        assert finite.all()
        same = bits(found) == bits(expected)
        same[1, 32:, 69] = True
        assert same.all()


def test_fp32_beyond_bf16_is_not_finite(kernel_device: torch.device) -> None:
    values = torch.full((1, 32, 1), 3.4e38)
    assert not launched(values.to(kernel_device), "floor", torch.float32).isfinite().any()
    assert not round_blocks(values, "floor").isfinite().any()


@every_rule
def test_operator_launches_the_kernel_where_kernels_run(
    rule: ExponentRule, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.model.kernels import triton_block_rounding

    launch = mock.Mock(side_effect=triton_block_rounding.round_values)
    monkeypatch.setattr(triton_block_rounding, "round_values", launch)
    monkeypatch.setattr(block_rounding, "fused_kernels_run_on", lambda _: True)
    values = torch.randn(2, 64, 70, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = values.to(kernel_device)
    round_blocks_(found, rule)
    launch.assert_called_once()
    assert torch.equal(bits(found), bits(mxfp4.rounded(values, rule)))


@every_rule
def test_device_without_the_kernel_rounds_by_the_definition_in_pieces(
    rule: ExponentRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(2, 96, 20, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = mxfp4.rounded(values, rule)
    definition = mock.Mock(side_effect=mxfp4.rounded)
    monkeypatch.setattr(mxfp4, "rounded", definition)
    monkeypatch.setattr(block_rounding, "PIECE_VALUES", 2 * 32 * 20)
    block_rounding.round_by_definition(values, rule, values)
    assert [len(call.args[0]) for call in definition.call_args_list] == [2, 2, 2]
    assert torch.equal(bits(values), bits(expected))


def test_operator_needs_no_values() -> None:
    values = torch.empty(2, 64, 6, dtype=torch.bfloat16, device="meta")
    round_blocks_(values, "floor")
    assert round_blocks(values, "floor").shape == values.shape


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(1, 48, 2), "a multiple of 32 inputs"),
        (torch.zeros(64, 2), "must be .n, inputs, outputs."),
        (torch.zeros(1, 32, 2, dtype=torch.float16), "must be bf16 or fp32"),
        (torch.zeros(1, 2, 32).transpose(1, 2), "contiguous"),
    ],
    ids=["part of a block", "no experts' axis", "fp16", "transposed"],
)
def test_what_is_no_whole_blocks_is_refused(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_blocks_(values, "floor")
