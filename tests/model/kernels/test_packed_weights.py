"""The kernel that decodes MXFP4 gives what the eager body gives, bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cpt.model.kernels.packed_weights import decode_mxfp4
from cpt.model.weights import mxfp4
from tests.support.expert_inputs import every_dtype

SHAPES = {
    "whole tiles": (2, 64, 4),
    "rows and blocks beside a tile": (3, 70, 5),
    "less than a tile": (1, 3, 1),
    "no experts": (0, 8, 2),
}
"""Experts, rows, and blocks of a row."""


def codes(shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random codes with every scale that is finite in fp32."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 253, shape, dtype=torch.uint8, generator=generator)
    scales.flatten()[:3] = torch.tensor([0, 1, 252], dtype=torch.uint8)[: scales.numel()]
    return blocks.to(device), scales.to(device)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_decodes_bit_for_bit_as_the_eager_body(
    shape: tuple[int, int, int], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_packed_weights

    blocks, scales = codes(shape, kernel_device)
    experts, rows, num_blocks = shape
    found = torch.empty(experts, num_blocks * 32, rows, dtype=dtype, device=kernel_device)
    triton_packed_weights.decode(blocks, scales, found)
    expected = mxfp4.decode(blocks.cpu(), scales.cpu(), dtype)
    assert torch.equal(bits(found), bits(expected))


def test_every_code_is_decoded_as_it_is_defined(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_packed_weights

    blocks = torch.arange(256, dtype=torch.uint8, device=kernel_device).view(1, 16, 1, 16)
    scales = torch.full((1, 16, 1), 128, dtype=torch.uint8, device=kernel_device)
    found = torch.empty(1, 32, 16, device=kernel_device)
    triton_packed_weights.decode(blocks, scales, found)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for byte in range(256):
        for position, code in enumerate((byte & 15, byte >> 4)):
            expected = 2 * table[code & 7] * (-1 if code & 8 else 1)
            assert found[0, 2 * (byte % 16) + position, byte // 16].item() == expected


def test_operator_knows_its_shape_without_values() -> None:
    blocks = torch.empty(2, 6, 3, 16, dtype=torch.uint8, device="meta")
    scales = torch.empty(2, 6, 3, dtype=torch.uint8, device="meta")
    decoded = decode_mxfp4(blocks, scales, torch.bfloat16)
    assert decoded.shape == (2, 96, 6)
    assert decoded.dtype == torch.bfloat16


@every_dtype
def test_operator_launches_the_kernel_where_kernels_run(
    dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.model.kernels import triton_packed_weights

    blocks, scales = codes((3, 70, 5), kernel_device)
    launch = mock.Mock(side_effect=triton_packed_weights.decode)
    monkeypatch.setattr(triton_packed_weights, "decode", launch)
    monkeypatch.setattr("cpt.model.kernels.packed_weights.fused_kernels_run_on", lambda _: True)
    found = decode_mxfp4(blocks, scales, dtype)
    launch.assert_called_once()
    assert found.device == blocks.device
    assert torch.equal(bits(found), bits(mxfp4.decode(blocks.cpu(), scales.cpu(), dtype)))
