"""MXFP4 against transformers' own decoding, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cpt.config.precision_sections import ExponentRule
from cpt.model.weights.mxfp4 import EXPONENT_RULES, decode, encode, rounded


def random_codes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 24, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 24, 5), dtype=torch.uint8, generator=generator)
    return blocks, scales


def test_decoding_equals_transformers_bit_for_bit() -> None:
    blocks, scales = random_codes()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(
        decode(blocks, scales).view(torch.int16), expected.contiguous().view(torch.int16)
    )


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 250])
def test_every_code_decodes_exactly_at_any_scale_that_bf16_can_hold(scale: int) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16)
    values = decode(blocks, torch.full((1, 16, 1), scale, dtype=torch.uint8), torch.float64)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for byte in range(256):
        for position, code in enumerate((byte & 15, byte >> 4)):
            expected = math.ldexp(table[code & 7] * (-1 if code & 8 else 1), scale - 127)
            assert values[0, 2 * (byte % 16) + position, byte // 16].item() == expected


def test_encoding_decoded_weights_loses_nothing() -> None:
    blocks, scales = random_codes(1)
    values = decode(blocks, scales)
    assert torch.equal(decode(*encode(values)), values)


def test_blocks_that_use_their_range_come_back_byte_for_byte() -> None:
    blocks, scales = random_codes(2)
    blocks[..., 0] = (blocks[..., 0] & 0xF0) | 0x07  # one value of 6 in every block
    again_blocks, again_scales = encode(decode(blocks, scales))
    assert torch.equal(again_blocks, blocks) and torch.equal(again_scales, scales)


def test_encoding_rounds_to_the_nearest_code_and_ties_to_the_even_one() -> None:
    values = torch.zeros(1, 32, 1)
    inputs = [
        6.0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
        0.26,
        0.74,
        5.01,
        4.99,
        -0.25,
        -0.75,
        0.0,
        7.9,
    ]
    rounded = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.5, 0.5, 6.0, 4.0, -0.0, -1.0, 0.0, 6.0]
    values[0, : len(inputs), 0] = torch.tensor(inputs)
    assert decode(*encode(values), torch.float32)[0, : len(inputs), 0].tolist() == rounded


def test_error_of_gaussian_weights_is_about_11_percent() -> None:
    """Rounding to nearest with the floor exponent costs about 11.4 % in relative l2."""
    values = torch.randn(4, 320, 96, generator=torch.Generator().manual_seed(3))
    error = (decode(*encode(values), torch.float32) - values).norm() / values.norm()
    assert 0.11 < float(error) < 0.118


def test_zero_block_stays_zero() -> None:
    assert not decode(*encode(torch.zeros(1, 64, 2))).any()


def test_inputs_that_do_not_fill_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        encode(torch.zeros(1, 48, 2))


def on_the_grid(seed: int, *, by: ExponentRule) -> torch.Tensor:
    """Return weights as a release has them whose exponents were chosen by a rule."""
    generator = torch.Generator().manual_seed(seed)
    return rounded(torch.randn(2, 96, 24, generator=generator).bfloat16(), by)


@pytest.mark.parametrize("by", EXPONENT_RULES)
@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_no_rule_changes_a_value_of_a_release(rule: ExponentRule, by: ExponentRule) -> None:
    released = on_the_grid(4, by=by)
    assert torch.equal(rounded(released, rule), released)
    for scale in (-126, 120):
        moved = torch.ldexp(released.float(), torch.tensor(scale)).bfloat16()
        assert torch.equal(rounded(rounded(moved, by), rule), rounded(moved, by))


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_full_blocks_come_back_byte_for_byte_under_each_rule(rule: ExponentRule) -> None:
    blocks, scales = random_codes(2)
    for largest in (0x06, 0x07):  # 4 and 6
        codes = blocks & 0xBB  # nothing above 3
        codes[..., 0] = (codes[..., 0] & 0xF0) | largest
        again_blocks, again_scales = encode(decode(codes, scales), rule)
        assert torch.equal(again_blocks, codes)
        assert torch.equal(again_scales, scales)


def exact_error(values: torch.Tensor, rule: ExponentRule) -> torch.Tensor:
    """Return the squared error of every block in float64."""
    wrong = decode(*encode(values, rule), torch.float64) - values.double()
    return wrong.square().unflatten(1, (-1, 32)).sum(2)


def test_ceil_clips_nothing_and_takes_the_smallest_such_exponent() -> None:
    values = torch.randn(4, 320, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    largest = values.double().abs().unflatten(1, (-1, 32)).amax(2)
    _, scales = encode(values, "ceil")
    exponents = scales.transpose(1, 2).double() - 127
    assert bool((largest <= 6 * 2**exponents).all())
    assert bool((largest > 3 * 2**exponents).all())


def test_ceil_is_exact_at_six_times_a_power_of_two() -> None:
    values = torch.zeros(1, 32, 3)
    values[0, 0] = torch.tensor([6.0, 6.03125, 5.96875])
    _, scales = encode(values, "ceil")
    assert scales.flatten().tolist() == [127, 128, 127]


def test_least_has_the_smallest_error_of_the_rules_in_every_block() -> None:
    values = torch.randn(4, 320, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    least = exact_error(values, "least")
    floor = exact_error(values, "floor")
    ceil = exact_error(values, "ceil")
    assert torch.equal(least, torch.minimum(floor, torch.where(ceil < floor, ceil, least)))
    assert bool((least <= ceil).all())
    assert bool((least < floor).any())


def test_least_takes_the_exponent_of_floor_if_the_errors_are_equal() -> None:
    values = torch.zeros(1, 32, 1)
    values[0, :2, 0] = torch.tensor([7.0, 1.0])  # 6 and 1 with one exponent, 8 and 1 with the next
    assert torch.equal(encode(values, "least")[1], encode(values, "floor")[1])


def test_least_keeps_a_release_that_moved_by_little() -> None:
    released = on_the_grid(6, by="ceil").float()
    noise = torch.randn(released.shape, generator=torch.Generator().manual_seed(7))
    moved = (released + 1e-2 * released.std() * noise).bfloat16()
    assert torch.equal(rounded(moved, "least").float(), released)
    assert not torch.equal(rounded(moved, "floor").float(), released)


@pytest.mark.parametrize("rule", EXPONENT_RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_none_finite_in_its_block_alone(
    rule: ExponentRule, bad: float
) -> None:
    values = torch.randn(1, 96, 2, generator=torch.Generator().manual_seed(8)).bfloat16()
    broken = values.clone()
    broken[0, 40, 1] = bad
    got = rounded(broken, rule)
    assert not got[0, 32:64, 1].isfinite().any()
    got[0, 32:64, 1] = rounded(values, rule)[0, 32:64, 1]
    assert torch.equal(got, rounded(values, rule))


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_blocks_at_both_ends_of_the_exponents_stay_finite_and_near(rule: ExponentRule) -> None:
    largest = torch.finfo(torch.bfloat16).max
    smallest = 2.0**-133  # a denormal of bf16
    values = torch.zeros(1, 32, 4, dtype=torch.bfloat16)
    values[0, 0] = torch.tensor([largest, -largest, smallest, 2.0**-126])
    got = rounded(values, rule)
    assert bool(got.isfinite().all())
    assert got[0, 0, 0] == -got[0, 0, 1]
    assert float(got[0, 0, 0]) >= 0.75 * largest
    assert float(got[0, 0, 2]) in (0.0, smallest)
    assert float(got[0, 0, 3]) == 2.0**-126
