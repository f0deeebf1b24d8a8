"""What is handed to torch's scaled products is what the definition makes of the operands.

`torch._scaled_mm` runs on a CPU. `torch._scaled_grouped_mm` does not: a stand-in multiplies what it
is given, and torch's own checks of shapes and strides run on tensors without values.
"""

from __future__ import annotations

import pytest
import torch

from cpt.model.products import scaled
from cpt.model.products.e4m3 import Scaling, encode, rounded
from cpt.model.products.recipe import EightBit

both_scalings = pytest.mark.parametrize("scaling", ["rows", "blocks"])
ROUNDING = 2**-8
"""bf16 rounds the result; sums in another order move a value to the next number at most."""


def operand(*shape: int, seed: int) -> torch.Tensor:
    """Normal numbers whose rows, columns and blocks have magnitudes of their own."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    exponents = torch.randint(-3, 4, shape, generator=generator)
    blocks = torch.randint(-3, 4, (*shape[:-2], 1, shape[-1]), generator=generator)
    return torch.ldexp(values, exponents + blocks).to(torch.bfloat16)


def from_tiles(tiles: torch.Tensor, num_rows: int, num_blocks: int) -> torch.Tensor:
    """Read the scales of a matrix from its tiles, byte by byte, in fp32."""
    data = tiles.reshape(-1).view(torch.uint8).tolist()
    across = -(-num_blocks // 4)
    scales = torch.empty(num_rows, num_blocks)
    for row in range(num_rows):
        for block in range(num_blocks):
            tile = row // 128 * across + block // 4
            inside = row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            byte = data[tile * 512 + inside]
            scales[row, block] = float("nan") if byte == 255 else 2.0 ** (byte - 127)
    return scales


def multiplied(
    codes_RK: torch.Tensor, scales_Rb: torch.Tensor, right_KN: torch.Tensor, right_bN: torch.Tensor
) -> torch.Tensor:
    """Multiply codes in float64."""
    share = codes_RK.shape[1] // scales_Rb.shape[1]
    left = codes_RK.double() * scales_Rb.double().repeat_interleave(share, 1)
    right = right_KN.double() * right_bN.double().repeat_interleave(share, 0)
    return left @ right


class GroupedStandIn:
    """Multiplies as `torch._scaled_grouped_mm` is documented to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        codes_RK: torch.Tensor,
        right_EKN: torch.Tensor,
        scales: torch.Tensor,
        right_scales: torch.Tensor,
        *,
        offs: torch.Tensor,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> torch.Tensor:
        self.calls += 1
        assert not use_fast_accum  # the definition adds up in fp32
        self._check(codes_RK, right_EKN, scales, right_scales, offs, out_dtype)
        num_blocks = codes_RK.shape[1] // 32
        columns = right_EKN.shape[2]
        parts = []
        start = first_tile_row = 0
        for expert, end in enumerate(offs.tolist()):
            rows = slice(start, end)
            if scales.dtype == torch.float32:
                left_scales = scales[rows, None]
                right = right_scales[expert][None]
            else:
                padded = -(-(end - start) // 128) * 128
                tiles = scales[first_tile_row : first_tile_row + padded]
                left_scales = from_tiles(tiles, end - start, num_blocks)
                right = from_tiles(right_scales[expert], columns, num_blocks).t()
                first_tile_row += padded
            parts.append(multiplied(codes_RK[rows], left_scales, right_EKN[expert], right))
            start = end
        return torch.cat(parts).to(out_dtype)

    @staticmethod
    def _check(*tensors: torch.Tensor | torch.dtype) -> None:
        """Let torch check shapes, strides and types."""
        *operands, out_dtype = tensors
        empty = []
        for tensor in operands:
            assert isinstance(tensor, torch.Tensor)
            empty.append(
                torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
                )
            )
        REAL_GROUPED(*empty[:4], offs=empty[4], out_dtype=out_dtype)


REAL_GROUPED = torch._scaled_grouped_mm


@both_scalings
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("counts", [(5, 0, 130, 1), (0, 128, 0, 129), (300,)], ids=str)
def test_grouped_kernel_is_given_the_codes_and_scales_of_the_definition(
    scaling: Scaling, transposed: bool, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = GroupedStandIn()
    monkeypatch.setattr(torch, "_scaled_grouped_mm", stand_in)
    inputs, outputs = 160, 96
    rows = operand(sum(counts), inputs, seed=1)
    matrices = operand(len(counts), inputs, outputs, seed=2)
    if transposed:
        matrices = operand(len(counts), outputs, inputs, seed=3).transpose(1, 2)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    found = EightBit(scaling, by_kernel=True).grouped_product(rows, matrices, ends)
    assert stand_in.calls == 1
    left = rounded(rows, 1, scaling).double().split(counts)
    right = rounded(matrices, 1, scaling).double()
    expected = torch.cat([x @ w for x, w in zip(left, right, strict=True)])
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
def test_scaled_product_of_a_cpu_is_the_emulation(transposed: bool) -> None:
    rows = operand(70, 2880, seed=1)
    weight = operand(96, 2880, seed=2)
    if transposed:
        weight = operand(2880, 96, seed=3).t()
    found = EightBit("rows", by_kernel=True).linear_product(rows, weight)
    expected = EightBit("rows").linear_product(rows.float(), weight.float())
    difference = (found.float() - expected).abs()
    assert (difference <= ROUNDING * expected.abs() + 1e-5 * expected.abs().max()).all()


def test_tiles_of_a_linear_layer_hold_each_scale_where_the_layout_says() -> None:
    _, scales = encode(operand(300, 192, seed=1), 1, "blocks")
    tiles = scaled._tiled(scaled._as_e8m0(scales)[None])
    assert tiles.shape == (1, 384, 8)
    assert torch.equal(from_tiles(tiles, 300, 6), scales)


def test_bytes_of_scales_are_those_of_the_format() -> None:
    scales = torch.tensor([2.0**-126, 0.5, 1.0, 2.0**120, float("nan")])
    found = scaled._as_e8m0(scales)
    assert found.tolist() == [1, 126, 127, 247, 255]
    assert torch.equal(found.view(torch.float8_e8m0fnu).float()[:4], scales[:4])
