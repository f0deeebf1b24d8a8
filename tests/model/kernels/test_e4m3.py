"""The kernels that round to E4M3 give what the definition gives, bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cpt.model.kernels.e4m3 import encode_columns, encode_rows
from cpt.model.products.e4m3 import Scaling, encode
from tests.support.expert_inputs import every_dtype

both_scalings = pytest.mark.parametrize("scaling", ["rows", "blocks"])
SHAPES = {
    "whole tiles": (2, 64, 128),
    "beside a tile": (3, 96, 70),
    "less than a tile": (1, 32, 3),
    "no experts": (0, 64, 64),
}
"""Experts, values along the sum, and columns."""


def operand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values of all magnitudes, ties, zeros of both signs, and what is not finite."""
    generator = torch.Generator().manual_seed(5)
    magnitude = torch.randint(-140, 120, (*shape[:-2], 1, shape[-1]), generator=generator)
    spread = torch.randint(-20, 1, shape, generator=generator)
    values = torch.ldexp(torch.randn(shape, generator=generator), magnitude + spread)
    ties = torch.randint(0, 64, shape, generator=generator) / 32
    values = torch.where(torch.rand(shape, generator=generator) < 0.2, ties, values)
    flat = values.flatten()
    for place, value in enumerate((0.0, -0.0, float("nan"), float("inf"), -float("inf"))):
        flat[place * 37 : place * 37 + 1] = value
    return flat.view(shape).to(dtype).to(device)


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Compare codes as bits but for the sign of NaN, and scales as numbers."""
    codes, scales = (tensor.cpu() for tensor in found)
    expected_codes, expected_scales = expected
    assert codes.shape == expected_codes.shape and scales.shape == expected_scales.shape
    bits = codes.view(torch.uint8)
    expected_bits = expected_codes.contiguous().view(torch.uint8)
    both_nan = ((bits & 0x7F) == 0x7F) & ((expected_bits & 0x7F) == 0x7F)
    assert torch.equal(bits[~both_nan], expected_bits[~both_nan])
    assert torch.equal(scales.nan_to_num(-1), expected_scales.float().nan_to_num(-1))


@every_dtype
@both_scalings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_rounds_rows_as_the_definition(
    shape: tuple[int, int, int], scaling: Scaling, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_e4m3

    values = operand(shape, dtype, kernel_device).transpose(1, 2)
    values = values.reshape(-1, shape[1]).contiguous()
    expected = encode(values.cpu(), 1, scaling)
    found = (
        torch.empty_like(values, dtype=torch.float8_e4m3fn),
        torch.empty(expected[1].shape, device=kernel_device),
    )
    triton_e4m3.encode_rows(values, *found)
    assert_same(found, expected)


@every_dtype
@both_scalings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_rounds_columns_as_the_definition_and_turns_them_over(
    shape: tuple[int, int, int], scaling: Scaling, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_e4m3

    values = operand(shape, dtype, kernel_device)
    codes, scales = encode(values.cpu(), 1, scaling)
    expected = codes.view(torch.uint8).transpose(1, 2), scales.transpose(1, 2)
    turned = shape[0], shape[2], shape[1]
    found = (
        torch.empty(turned, dtype=torch.float8_e4m3fn, device=kernel_device),
        torch.empty(expected[1].shape, device=kernel_device),
    )
    triton_e4m3.encode_columns(values, *found)
    assert_same(found, expected)


def test_every_number_and_every_border_of_e4m3_is_coded_as_torch_codes_it(
    kernel_device: torch.device,
) -> None:
    """One row whose scale is 1: all bf16 numbers up to 448, and what is just beside each border."""
    from cpt.model.kernels import triton_e4m3

    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = (numbers[1:] + numbers[:-1]) / 2
    below = torch.nextafter(borders, torch.tensor(0.0))
    above = torch.nextafter(borders, torch.tensor(1000.0))
    row = torch.cat([numbers, borders, below, above, torch.tensor([1e-30, 2.0**-140])])
    row = torch.cat([row, -row])[None].to(kernel_device)
    codes = torch.empty_like(row, dtype=torch.float8_e4m3fn)
    scales = torch.empty(1, 1, device=kernel_device)
    triton_e4m3.encode_rows(row, codes, scales)
    assert scales.item() == 1
    expected = row.cpu().to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


@both_scalings
def test_operators_know_their_shapes_without_values(scaling: Scaling) -> None:
    in_blocks = scaling == "blocks"
    rows = torch.empty(6, 96, dtype=torch.bfloat16, device="meta")
    codes, scales = encode_rows(rows, in_blocks)
    assert codes.shape == (6, 96) and codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (6, 3 if in_blocks else 1)
    matrices = torch.empty(2, 96, 5, dtype=torch.bfloat16, device="meta")
    codes, scales = encode_columns(matrices, in_blocks)
    assert codes.shape == (2, 5, 96) and scales.shape == (2, 5, 3 if in_blocks else 1)


@both_scalings
def test_operators_launch_the_kernels_where_kernels_run(
    scaling: Scaling, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.model.kernels import triton_e4m3

    values = operand((2, 64, 6), torch.bfloat16, kernel_device)
    rows = values.transpose(1, 2).reshape(-1, 64).contiguous()
    in_blocks = scaling == "blocks"
    monkeypatch.setattr("cpt.model.kernels.e4m3.fused_kernels_run_on", lambda _: False)
    expected = encode_rows(rows.cpu(), in_blocks), encode_columns(values.cpu(), in_blocks)
    launched = []
    for name in ("encode_rows", "encode_columns"):
        launched.append(mock.Mock(side_effect=getattr(triton_e4m3, name)))
        monkeypatch.setattr(triton_e4m3, name, launched[-1])
    monkeypatch.setattr("cpt.model.kernels.e4m3.fused_kernels_run_on", lambda _: True)
    assert_same(encode_rows(rows, in_blocks), expected[0])
    assert_same(encode_columns(values, in_blocks), expected[1])
    for launch in launched:
        launch.assert_called_once()
