"""Blocks of 8 bits hold what their definition says, and what was decoded encodes to the same."""

from __future__ import annotations

import math

import pytest
import torch

from cpt.storage.narrow_moments import CUT, Blocks
from cpt.storage.state_bytes import MOMENT_BLOCK


def empty_blocks(num_blocks: int, *, signed: bool) -> Blocks:
    return Blocks(
        codes=torch.zeros(num_blocks * MOMENT_BLOCK, dtype=torch.uint8),
        exponents=torch.zeros(num_blocks, dtype=torch.uint8),
        signed=signed,
    )


def decoded(blocks: Blocks) -> torch.Tensor:
    values = torch.full((len(blocks.codes),), math.nan)
    blocks.decode(values)
    return values


def held(values: torch.Tensor, *, signed: bool) -> Blocks:
    blocks = empty_blocks(len(values) // MOMENT_BLOCK, signed=signed)
    blocks.fill(values)
    return blocks


def many_values(*, signed: bool) -> torch.Tensor:
    """Return blocks of all magnitudes, with zeros, a block of zeros and blocks of one value."""
    generator = torch.Generator().manual_seed(3)
    num_blocks = 400
    shape = (num_blocks, MOMENT_BLOCK)
    scale = 2.0 ** torch.randint(-100, 40, (num_blocks, 1), generator=generator)
    spread = 2.0 ** (-40 * torch.rand(shape, generator=generator) ** 2)
    values = torch.randn(shape, generator=generator) * spread * scale
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values[7] = 0
    values[8] = 0.75
    values[9] *= 1e-30
    values[10] *= 0
    values[10, 5] = 1.9999
    flat = values.flatten()
    return flat if signed else flat.square()


def value_of(code: int, exponent: int, *, signed: bool) -> float:
    """Return what a code stands for, by the words of the definition."""
    if not signed:
        steps = max(exponent - 31, 0) * 8 + code
        binade, fraction = divmod(steps, 8)
        if binade == 0:
            return fraction / 8 * 2.0**-126
        return (1 + fraction / 8) * 2.0 ** (binade - 127)
    sign = -1.0 if code >= 128 else 1.0
    if code % 128 == 0:
        return sign * 0.0
    steps = max(exponent - 15, 0) * 8 + code % 128
    binade, fraction = divmod(steps, 8)
    if binade == 0:
        return sign * fraction / 8 * 2.0**-126
    return sign * (1 + fraction / 8) * 2.0 ** (binade - 127)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("exponent", [0, 40, 90, 127, 140])
def test_every_code_stands_for_the_value_of_the_definition(exponent: int, *, signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    exponents = torch.full((256 // MOMENT_BLOCK,), exponent, dtype=torch.uint8)
    found = decoded(Blocks(codes=codes, exponents=exponents, signed=signed)).tolist()
    for code, value in enumerate(found):
        assert value == value_of(code, exponent, signed=signed), code


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_decoded_is_encoded_to_the_same_bits(*, signed: bool) -> None:
    """With rounding to the nearest, and with the largest and the smallest random number."""
    blocks = held(many_values(signed=signed), signed=signed)
    values = decoded(blocks)
    assert torch.isfinite(values).all()
    again = held(values, signed=signed)
    assert torch.equal(again.codes, blocks.codes)
    assert torch.equal(again.exponents, blocks.exponents)
    for noise in (0, (1 << CUT["int8"]) - 1):
        rounded = values.clone()
        rounded.view(torch.int32).add_(noise)
        again.encode(rounded)
        assert torch.equal(again.codes, blocks.codes), noise
        assert torch.equal(again.exponents, blocks.exponents), noise


@pytest.mark.parametrize("signed", [True, False])
def test_values_near_the_largest_of_their_block_are_held_to_a_sixteenth(*, signed: bool) -> None:
    values = many_values(signed=signed)
    found = decoded(held(values, signed=signed)).view(-1, MOMENT_BLOCK)
    blocks = values.view(-1, MOMENT_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    near = (blocks.abs() >= largest * (2**-14 if signed else 2**-29)) & (largest > 2.0**-90)
    error = ((found - blocks).abs() / blocks.abs())[near]
    assert float(error.max()) <= 1 / 16 + 1e-6


def test_a_second_moment_is_never_held_as_zero_beside_one_that_is_not() -> None:
    values = torch.zeros(MOMENT_BLOCK)
    values[0] = 1.0
    values[1] = 1e-20
    found = decoded(held(values, signed=False))
    assert found[0] == 1
    assert found[1:].tolist() == [2.0**-31] * (MOMENT_BLOCK - 1)


def test_blocks_of_zeros_stay_zero() -> None:
    for signed in (True, False):
        assert not decoded(held(torch.zeros(2 * MOMENT_BLOCK), signed=signed)).any()


def test_a_first_moment_far_below_the_largest_becomes_zero_and_keeps_its_sign_above() -> None:
    values = torch.zeros(MOMENT_BLOCK)
    values[:4] = torch.tensor([1.0, -(2.0**-14), 2.0**-16, -0.0])
    found = decoded(held(values, signed=True))
    assert found[:3].tolist() == [1.0, -(2.0**-14), 0.0]


def test_parts_that_cut_a_block_are_no_parts() -> None:
    blocks = empty_blocks(2, signed=True)
    assert len(blocks.narrow(MOMENT_BLOCK, MOMENT_BLOCK).codes) == MOMENT_BLOCK
    with pytest.raises(AssertionError, match="cut blocks"):
        blocks.narrow(32, MOMENT_BLOCK)
