"""Rounding to E4M3 with power-of-two scales: the definition of 8-bit products."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from cpt.model.products import e4m3
from cpt.model.products.e4m3 import BLOCK, Scaling, decode, encode, rounded
from cpt.model.weights import mxfp4

both_scalings = pytest.mark.parametrize("scaling", ["rows", "blocks"])


def e4m3_numbers() -> list[Fraction]:
    """All numbers >= 0 of E4M3 in order, from the format: index = its 7 bits below the sign."""
    numbers = []
    for bits in range(127):  # 127 is NaN
        exponent, fraction = divmod(bits, 8)
        if exponent == 0:
            numbers.append(Fraction(fraction, 2**9))
        else:
            numbers.append(Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7))
    return numbers


NUMBERS = e4m3_numbers()


def exact_scale(largest: Fraction) -> Fraction:
    """The smallest 2^e with e >= -126 whose 448-fold is not below the largest magnitude."""
    scale = Fraction(2) ** -126
    while 448 * scale < largest:
        scale *= 2
    return scale


def exact_rounding(values: list[float]) -> list[float]:
    """What values that share a scale become: nearest, ties to the even code, in fractions."""
    scale = exact_scale(max(abs(Fraction(value)) for value in values))
    found = []
    for value in values:
        magnitude = abs(Fraction(value)) / scale
        code = min(range(127), key=lambda c: (abs(NUMBERS[c] - magnitude), c % 2))
        found.append(math.copysign(float(NUMBERS[code] * scale), value))
    return found


def drawn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(-12, 3, sizes, generator=generator)
    return torch.ldexp(torch.randn(*sizes, generator=generator), magnitude).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_scalings
def test_every_value_becomes_the_nearest_number_that_its_scale_allows(
    scaling: Scaling, dtype: torch.dtype
) -> None:
    values = drawn(6, 2 * BLOCK, dtype=dtype)
    sharing = values if scaling == "rows" else values.reshape(-1, BLOCK)
    expected = [exact_rounding(row) for row in sharing.tolist()]
    found = rounded(values, 1, scaling).view(sharing.shape)
    assert found.tolist() == expected


def test_ties_go_to_the_even_code() -> None:
    row = torch.tensor([[256.0, 17.0, 19.0, -17.0, 2.5 / 512, 3.5 / 512, 0.5 / 512]])
    # numbers near 17 are 16 (code even) and 18; those below 2^-6 are multiples of 2^-9
    expected = [256.0, 16.0, 20.0, -16.0, 2 / 512, 4 / 512, 0.0]
    assert rounded(row, 1, "rows").tolist() == [expected]


def test_largest_magnitude_lands_between_224_and_448() -> None:
    largest = torch.cat([drawn(1000).abs(), torch.tensor([1.75, 1.7500001, 1.0, 448, 448.00003])])
    _, scales = encode(largest[:, None], 1, "rows")
    quotient = largest / scales[:, 0]
    assert (quotient > 224).all() and (quotient <= 448).all()
    assert (scales.frexp().mantissa == 0.5).all()


@both_scalings
def test_zeros_stay_zeros_with_the_smallest_scale(scaling: Scaling) -> None:
    codes, scales = encode(torch.zeros(2, BLOCK), 1, scaling)
    assert not codes.float().any()
    assert (scales == 2.0**e4m3.LOWEST_EXPONENT).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@both_scalings
def test_what_is_not_finite_makes_all_that_shares_its_scale_nan(
    scaling: Scaling, value: float
) -> None:
    values = drawn(3, 2 * BLOCK)
    values[1, 5] = value
    found = rounded(values, 1, scaling)
    shared = slice(None) if scaling == "rows" else slice(0, BLOCK)
    assert found[1, shared].isnan().all()
    found[1, shared] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("exponent", [-133, -130, -127, -126, -120, 0, 100, 127])
def test_decoded_values_are_exact_in_bf16_at_both_ends_of_its_exponents(exponent: int) -> None:
    """-133 is the exponent of the smallest number of bf16, 127 that of its largest."""
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.rand(64, 64, generator=generator) * 0.93 + 1
    signs = torch.randint(-1, 2, (64, 64), generator=generator)
    values = (magnitudes.double() * signs * 2.0**exponent).to(torch.bfloat16)
    codes, scales = encode(values, 1, "rows")
    exact = codes.double() * scales.double()
    assert exact.isfinite().all() and exact.any()
    assert torch.equal(decode(codes, scales, 1, torch.bfloat16).double(), exact)
    assert exact.tolist()[0] == exact_rounding(values[0].tolist())


@both_scalings
def test_rounding_twice_is_rounding_once(scaling: Scaling) -> None:
    once = rounded(drawn(5, 96), 1, scaling)
    assert torch.equal(rounded(once, 1, scaling), once)


@both_scalings
def test_a_transposed_view_is_rounded_along_the_axis_of_its_sum(scaling: Scaling) -> None:
    matrices = drawn(3, 64, 96)
    found = rounded(matrices.transpose(1, 2), 1, scaling)
    expected = rounded(matrices, 2, scaling).transpose(1, 2)
    assert torch.equal(found, expected)
    assert found.stride() == matrices.transpose(1, 2).stride()
    assert not torch.equal(found, rounded(matrices, 1, scaling).transpose(1, 2))


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(7, 64, 32)
    whole = rounded(values, 1, "rows")
    monkeypatch.setattr(e4m3, "PIECE_VALUES", 2 * 64 * 32)
    assert torch.equal(rounded(values, 1, "rows"), whole)


def test_mxfp8_holds_every_mxfp4_weight_exactly() -> None:
    """Blocks run along the same 32 inputs, and E2M1 has fewer bits in range and precision."""
    values = drawn(2, 64, 48)
    values[:, BLOCK:] *= 2**-20
    values = mxfp4.rounded(values, "floor")
    assert values.any()
    assert torch.equal(rounded(values, 1, "blocks"), values)
    assert not torch.equal(rounded(values, 1, "rows"), values)
