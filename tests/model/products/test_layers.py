"""Layers with 8-bit products give what autograd makes of their operands, rounded straight through.

Everything is in float64, so only the order of sums differs, and the rounding of a value moves where
that crosses a border between two codes: it does not with these numbers, and 1e-10 would show it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from cpt.model.adapters.linear import AdaptedLinear
from cpt.model.experts.function import Activation, Parameters, apply_experts
from cpt.model.experts.grouped import Groups
from cpt.model.products.e4m3 import Scaling
from cpt.model.products.linear import EightBitLinear
from cpt.model.products.recipe import EightBit
from tests.model.products import straight_through

TOLERANCE = 1e-10
COUNTS = (5, 0, 11, 1)
MODEL_SIZE = 64
EXPERT_SIZE = 32
ACTIVATION = Activation(1.702, 7.0)

both_scalings = pytest.mark.parametrize("scaling", ["rows", "blocks"])


def normal(*sizes: int, seed: int) -> Tensor:
    """Return numbers of which some are so small that the scalings round them differently."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    if sizes[-1] > 32:
        values[..., :32] *= 2.0**-16
    return values.requires_grad_()


def expert_tensors() -> Parameters:
    experts = len(COUNTS)
    return Parameters(
        normal(experts, MODEL_SIZE, 2 * EXPERT_SIZE, seed=1),
        normal(experts, 2 * EXPERT_SIZE, seed=2),
        normal(experts, EXPERT_SIZE, MODEL_SIZE, seed=3),
        normal(experts, MODEL_SIZE, seed=4),
    )


def gradients(out: Tensor, of: Iterable[Tensor]) -> list[Tensor]:
    d_out = normal(*out.shape, seed=9).detach().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(of), d_out)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        error = (x - y).norm() / y.norm()
        assert error <= tolerance, f"relative error {error}, largest {(x - y).abs().max()}"


def expert_layer(eight_bit: EightBit | None, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the output and all gradients of the layer of this project."""

    def leaf(values: Tensor) -> Tensor:
        return values.detach().to(dtype).requires_grad_()

    rows_RM = leaf(normal(sum(COUNTS), MODEL_SIZE, seed=5))
    weights_R = leaf(normal(sum(COUNTS), seed=6))
    tensors = Parameters(*map(leaf, expert_tensors()))
    out = apply_experts(
        rows_RM,
        weights_R,
        Groups(torch.tensor(COUNTS)),
        tensors,
        ACTIVATION,
        eight_bit=eight_bit,
        grouped=False,
    )
    return gradients(out, [rows_RM, weights_R, *tensors])


@both_scalings
def test_experts_give_the_gradients_of_operands_rounded_straight_through(
    scaling: Scaling,
) -> None:
    rows_RM = normal(sum(COUNTS), MODEL_SIZE, seed=5)
    weights_R = normal(sum(COUNTS), seed=6)
    tensors = expert_tensors()
    out = straight_through.experts(rows_RM, weights_R, COUNTS, tensors, ACTIVATION, scaling)
    expected = gradients(out, [rows_RM, weights_R, *tensors])
    assert_equal(expert_layer(EightBit(scaling)), expected, TOLERANCE)


@both_scalings
def test_linear_layer_gives_the_gradients_of_operands_rounded_straight_through(
    scaling: Scaling,
) -> None:
    layer = nn.Linear(64, 96, dtype=torch.float64)
    input_BSI = normal(2, 7, 64, seed=1)
    plain = straight_through.product(input_BSI.view(14, 64), layer.weight.t(), scaling)
    expected_out = (plain + layer.bias).view(2, 7, 96)
    expected = gradients(expected_out, [input_BSI, layer.weight, layer.bias])
    eight_bit = EightBitLinear(layer, EightBit(scaling)).train()
    found = gradients(eight_bit(input_BSI), [input_BSI, layer.weight, layer.bias])
    assert_equal(found, expected, TOLERANCE)


def test_the_two_scalings_round_differently() -> None:
    """Otherwise the comparisons above would pass with either in place of the other."""
    rows = expert_layer(EightBit("rows"))
    blocks = expert_layer(EightBit("blocks"))
    assert not torch.allclose(rows[1], blocks[1], rtol=1e-6, atol=0)


def test_rounding_shows() -> None:
    """Otherwise the comparisons above would pass without it."""
    exact = expert_layer(None)
    rounded_ones = expert_layer(EightBit("rows"))
    for x, y in zip(rounded_ones, exact, strict=True):
        error = float((x - y).norm() / y.norm())
        assert 1e-3 < error < 0.2 or torch.equal(x, y)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_adapter_is_in_the_working_precision_beside_a_product_in_8_bits(magnitude: bool) -> None:
    """Ones are exact in 8 bits, so with them the layer is that without rounding to the bit."""
    linear = nn.Linear(64, 32, dtype=torch.float64)
    plain = AdaptedLinear(linear, 8, 0.5, with_magnitude=magnitude)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    eight_bit = copy.deepcopy(plain)
    eight_bit.eight_bit = EightBit("rows")
    input_RI = normal(9, 64, seed=1).detach()
    difference = (eight_bit(input_RI) - plain(input_RI)).norm() / plain(input_RI).norm()
    assert 1e-3 < difference < 0.1
    with torch.no_grad():
        eight_bit.weight.sign_()
        plain.weight.sign_()
    assert torch.equal(eight_bit(input_RI.sign()), plain(input_RI.sign()))


def test_evaluation_is_in_the_working_precision() -> None:
    linear = nn.Linear(64, 32)
    eight_bit = EightBitLinear(linear, EightBit("rows"))
    input_RI = normal(9, 64, seed=1).detach().float()
    assert not torch.equal(eight_bit(input_RI), linear(input_RI))
    assert torch.equal(eight_bit.eval()(input_RI), linear(input_RI))


def test_layer_in_8_bits_is_off_by_per_cents_where_one_in_bf16_is_off_by_tenths_of_them() -> None:
    """Against float64, with operands large enough to reach the clamps of the gated unit."""
    exact = expert_layer(None)
    bf16 = expert_layer(None, dtype=torch.bfloat16)
    eight_bit = expert_layer(EightBit("rows"), dtype=torch.bfloat16)
    of_last_bias = len(exact) - 1  # its gradient takes no product with a matrix
    for index, (plain, coarse, want) in enumerate(zip(bf16, eight_bit, exact, strict=True)):
        assert (plain.double() - want).norm() / want.norm() < 1e-2
        error = (coarse.double() - want).norm() / want.norm()
        assert error < 1e-2 if index == of_last_bias else 0.03 < error < 0.16
