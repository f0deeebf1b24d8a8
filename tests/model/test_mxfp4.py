"""MXFP4 against transformers' own decoding, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cpt.model.weights.mxfp4 import decode, encode


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
