"""The Triton kernels of gated_unit.py: one program for a tile of rows and all of its columns.

NaN goes through clamps and their gradients as it does in torch: comparisons with it are false, and
a product with 0 keeps it.

Shape letters: R rows sorted by expert, I expert size, E experts, T tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from cpt.model.kernels.triton_expert_tiles import (
    ROWS,
    find_tile,
    num_tiles,
    padded,
    sum_tiles,
)

FORWARD_PAIRS = 64
"""Pairs of gate and up that a program works on at a time, in each row of its tile."""

BACKWARD_PAIRS = 32
"""The same in the backward, which holds more of each pair."""

WARPS = 4
"""Warps of a program. Of 20 combinations of rows, pairs and warps on an H100, 65,536 rows of 2,880
pairs took 0.44 ms forward and 1.32 ms backward with these, and 0.44 and 2.05 ms with 8 warps and 64
pairs.
"""


@triton.jit
def _load_pairs(
    gate_up: tl.tensor,
    bias: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    bias_places: tl.tensor,
    bias_inside: tl.tensor,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> Any:
    """Return gate and up with their bias, (ROWS, PAIRS) each, in fp32."""
    raw = tl.load(gate_up + places, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + bias_places, mask=bias_inside, other=0).to(tl.float32)
    return tl.split(tl.reshape(raw + shift[None, :], (ROWS, PAIRS, 2)))


@triton.jit
def _forward(
    gate_up: tl.tensor,
    bias: tl.tensor,
    ends: tl.tensor,
    hidden: tl.tensor,
    num_experts: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    expert, first, stop = find_tile(ends, num_experts, tl.program_id(0), ROWS, EXPERTS)
    if first >= stop:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    for start in range(0, SIZE, PAIRS):
        column = start + tl.arange(0, PAIRS)
        both = 2 * start + tl.arange(0, 2 * PAIRS)
        is_column = both < 2 * SIZE
        places = rows * (2 * SIZE) + both[None, :]
        inside = (rows < stop) & is_column[None, :]
        bias_places = expert * 2 * SIZE + both
        gate, up = _load_pairs(gate_up, bias, places, inside, bias_places, is_column, ROWS, PAIRS)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        value = (up + 1) * gate * tl.sigmoid(alpha * gate)
        tl.store(
            hidden + rows * SIZE + column[None, :],
            value.to(hidden.dtype.element_ty),
            mask=(rows < stop) & (column < SIZE)[None, :],
        )


@triton.jit
def _backward(
    gate_up: tl.tensor,
    d_hidden: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    ends: tl.tensor,
    d_gate_up: tl.tensor,
    weighted: tl.tensor,
    products: tl.tensor,
    tile_sums: tl.tensor,
    num_experts: tl.tensor,
    weights_stride: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    NEED_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert, first, stop = find_tile(ends, num_experts, tile, ROWS, EXPERTS)
    if first >= stop:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    rows = row[:, None]
    weight = tl.load(weights + row * weights_stride, mask=row < stop, other=0).to(tl.float32)
    product = tl.zeros((ROWS, PAIRS), tl.float32)
    for start in range(0, SIZE, PAIRS):
        column = start + tl.arange(0, PAIRS)
        both = 2 * start + tl.arange(0, 2 * PAIRS)
        is_column = both < 2 * SIZE
        places = rows * (2 * SIZE) + both[None, :]
        inside = (rows < stop) & is_column[None, :]
        hidden_places = rows * SIZE + column[None, :]
        hidden_inside = (rows < stop) & (column < SIZE)[None, :]
        bias_places = expert * 2 * SIZE + both
        gate_raw, up_raw = _load_pairs(
            gate_up, bias, places, inside, bias_places, is_column, ROWS, PAIRS
        )
        d = tl.load(d_hidden + hidden_places, mask=hidden_inside, other=0).to(tl.float32)

        gate = tl.where(gate_raw > limit, limit, gate_raw)
        up = tl.where(up_raw > limit, limit, tl.where(up_raw < -limit, -limit, up_raw))
        sigmoid = tl.sigmoid(alpha * gate)
        glu = gate * sigmoid
        value = glu * (up + 1)
        product += d * value
        scaled = d * weight[:, None]
        d_gate = (sigmoid + alpha * glu * (1 - sigmoid)) * (up + 1) * scaled
        d_gate *= (gate_raw <= limit).to(tl.float32)
        d_up = glu * scaled * (tl.abs(up_raw) <= limit).to(tl.float32)
        value = value * weight[:, None]
        tl.store(weighted + hidden_places, value.to(weighted.dtype.element_ty), mask=hidden_inside)
        d_both = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * PAIRS))
        tl.store(d_gate_up + places, d_both.to(d_gate_up.dtype.element_ty), mask=inside)
        if NEED_BIAS:
            sums_places = tile.to(tl.int64) * (2 * SIZE) + both
            tl.store(tile_sums + sums_places, tl.sum(d_both, 0), mask=is_column)
    tl.store(products + row, tl.sum(product, 1).to(products.dtype.element_ty), mask=row < stop)


def forward(
    gate_up_R2I: torch.Tensor,
    bias_E2I: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    hidden_RI: torch.Tensor,
) -> None:
    """Write `hidden`, rounded once to its dtype; see `gated_unit`."""
    assert gate_up_R2I.is_contiguous() and bias_E2I.is_contiguous() and hidden_RI.is_contiguous()
    num_rows, size = hidden_RI.shape
    num_experts = ends_E.numel()
    _forward[(num_tiles(num_rows, num_experts),)](
        gate_up_R2I,
        bias_E2I,
        ends_E,
        hidden_RI,
        num_experts,
        alpha,
        limit,
        SIZE=size,
        ROWS=ROWS,
        PAIRS=FORWARD_PAIRS,
        EXPERTS=padded(num_experts),
        num_warps=WARPS,
    )


def backward(
    gate_up_R2I: torch.Tensor,
    d_hidden_RI: torch.Tensor,
    bias_E2I: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    alpha: float,
    limit: float,
    *,
    d_gate_up_R2I: torch.Tensor,
    weighted_RI: torch.Tensor,
    products_R: torch.Tensor,
    d_bias_E2I: torch.Tensor | None,
) -> None:
    """Write what `gated_unit_backward` writes, each rounded once to its dtype.

    `d_gate_up_R2I` may be `gate_up_R2I`, and `weighted_RI` may be `d_hidden_RI`.
    """
    assert gate_up_R2I.is_contiguous() and d_hidden_RI.is_contiguous() and bias_E2I.is_contiguous()
    num_rows, size = d_hidden_RI.shape
    num_experts = ends_E.numel()
    tiles = num_tiles(num_rows, num_experts)
    need_bias = d_bias_E2I is not None
    sums_shape = (tiles, 2 * size) if need_bias else (0,)
    tile_sums_T2I = gate_up_R2I.new_empty(sums_shape, dtype=torch.float32)
    _backward[(tiles,)](
        gate_up_R2I,
        d_hidden_RI,
        bias_E2I,
        weights_R,
        ends_E,
        d_gate_up_R2I,
        weighted_RI,
        products_R,
        tile_sums_T2I,
        num_experts,
        weights_R.stride(0),
        alpha,
        limit,
        NEED_BIAS=need_bias,
        SIZE=size,
        ROWS=ROWS,
        PAIRS=BACKWARD_PAIRS,
        EXPERTS=padded(num_experts),
        num_warps=WARPS,
    )
    if d_bias_E2I is not None:
        sum_tiles(tile_sums_T2I, ends_E, d_bias_E2I)
