"""Bytes of optimizer state are counted by the form that its moments have."""

from __future__ import annotations

import pytest

from cpt.storage.state_bytes import (
    MOMENT_BLOCK,
    STORED_BYTES,
    MomentForm,
    moments_of_group,
    optimizer_bytes,
)


@pytest.mark.parametrize(("form", "expected"), [("fp32", 12.0), ("bf16", 8.0), ("int8", 6.03125)])
def test_bytes_of_a_parameter_are_those_of_its_master_and_two_moments(
    form: MomentForm, expected: float
) -> None:
    assert optimizer_bytes(MOMENT_BLOCK, form) == expected * MOMENT_BLOCK


def test_an_optimizer_with_a_momentum_alone_needs_no_second_moment() -> None:
    assert optimizer_bytes(10, num_moments=1) == 80


def test_a_group_has_adams_moments_in_fp32_unless_it_says_otherwise() -> None:
    assert moments_of_group({"params": []}) == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    assert moments_of_group({"moments": {"exp_avg": "bf16"}}) == {"exp_avg": "bf16"}


def test_a_checkpoint_holds_moments_in_fp32() -> None:
    assert STORED_BYTES == 12
