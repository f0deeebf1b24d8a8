"""Gathered rows, sums of a token's rows, and packed rows: the kernels give what eager code gives.

The sums are taken in the same order, so the kernels' are equal to the last bit where they store
fp32. Triton's interpreter truncates what it stores in bf16; there, the operators are compared, and
run the kernels on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpt.model.experts.dispatch import Assignment
from cpt.model.kernels.rows import combine_rows, gather_rows, gather_rows_into, pack_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("num_tokens", "top_k", "size"), [(1, 4, 2880), (13, 3, 50), (6, 1, 64), (0, 4, 64)]
)
EXPERTS = 8


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def assignment(num_tokens: int, top_k: int, device: torch.device) -> Assignment:
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    return Assignment.of(scores.topk(top_k).indices.to(device), EXPERTS)


def sums(rows: Tensor, places: Tensor) -> Tensor:
    """Return the sums in fp32, in order."""
    total = torch.zeros(places.shape[0], rows.shape[1], device=rows.device)
    for column in places.unbind(1):
        total += rows[column].float()
    return total


@SHAPES
@DTYPES
@pytest.mark.parametrize("beside", [0, 8])
def test_combine_kernel_gives_the_sums_in_order(
    num_tokens: int,
    top_k: int,
    size: int,
    beside: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    from cpt.model.kernels import triton_rows

    places = assignment(num_tokens, top_k, kernel_device).places_Nk
    wide = random(places.numel(), size + beside, dtype=dtype, device=kernel_device)
    rows = wide[:, :size]
    out = torch.full((num_tokens, size), torch.nan, device=kernel_device)
    triton_rows.combine(rows, places, out)
    assert torch.equal(out, sums(rows, places))


@SHAPES
@DTYPES
@pytest.mark.parametrize("beside", [0, 8])
def test_gather_kernel_copies_rows(
    num_tokens: int,
    top_k: int,
    size: int,
    beside: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    from cpt.model.kernels import triton_rows

    tokens_R = assignment(num_tokens, top_k, kernel_device).tokens_R
    rows = random(num_tokens, size + beside, dtype=dtype, device=kernel_device)[:, :size]
    out = torch.full((num_tokens * top_k, size), torch.nan, dtype=dtype, device=kernel_device)
    triton_rows.gather(rows, tokens_R, out)
    assert torch.equal(out, rows[tokens_R])


@SHAPES
@DTYPES
def test_pack_kernel_writes_token_weight_and_zeros(
    num_tokens: int, top_k: int, size: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_rows

    tokens = random(num_tokens, size, dtype=dtype, device=kernel_device)
    weights = random(num_tokens, top_k, dtype=dtype, device=kernel_device)
    rows = assignment(num_tokens, top_k, kernel_device)
    payload = torch.full((num_tokens * top_k, size + 8), torch.nan, device=kernel_device)
    triton_rows.pack(tokens, weights, rows.order_R, payload)
    assert torch.equal(payload[:, :size], tokens[rows.tokens_R].float())
    assert torch.equal(payload[:, size], weights.flatten()[rows.order_R].float())
    assert torch.equal(payload[:, size + 1 :], torch.zeros_like(payload[:, size + 1 :]))


@SHAPES
@DTYPES
def test_operators_round_once(
    num_tokens: int, top_k: int, size: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    rows = assignment(num_tokens, top_k, kernel_device)
    values = random(num_tokens * top_k, size, dtype=dtype, device=kernel_device)
    expected = sums(values, rows.places_Nk).to(dtype)
    assert torch.equal(combine_rows(values, rows.places_Nk), expected)
    assert torch.equal(gather_rows(values, rows.order_R), values[rows.order_R])
    tokens = random(num_tokens, size, dtype=dtype, device=kernel_device)
    weights = random(num_tokens, top_k, dtype=dtype, device=kernel_device)
    payload = pack_rows(tokens, weights, rows.order_R, 8)
    assert payload.dtype == dtype
    assert torch.equal(payload[:, :size], tokens[rows.tokens_R])
    assert torch.equal(payload[:, size], weights.flatten()[rows.order_R])


def test_operators_take_columns_of_a_wider_tensor(kernel_device: torch.device) -> None:
    rows = assignment(9, 4, kernel_device)
    wide = random(36, 72, dtype=torch.bfloat16, device=kernel_device)
    for view in (wide[:, :64], wide.t()[:36, :36], wide[:1].expand(36, 72)):
        expected = sums(view, rows.places_Nk).bfloat16()
        assert torch.equal(combine_rows(view, rows.places_Nk), expected)
        assert torch.equal(gather_rows(view, rows.order_R), view[rows.order_R])


def test_float64_stays_float64(kernel_device: torch.device) -> None:
    rows = assignment(9, 4, kernel_device)
    values = random(36, 20, dtype=torch.float64, device=kernel_device)
    expected = values[rows.places_Nk].sum(1)
    assert torch.allclose(combine_rows(values, rows.places_Nk), expected, rtol=1e-14, atol=1e-14)


@DTYPES
def test_packed_rows_have_the_gradients_of_their_parts(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    rows = assignment(9, 4, kernel_device)
    tokens = random(9, 40, dtype=dtype, device=kernel_device).requires_grad_()
    weights = random(9, 4, dtype=dtype, device=kernel_device).requires_grad_()
    payload = rows.pack(tokens, weights)
    gradient = random(*payload.shape, dtype=dtype, device=kernel_device)
    found = torch.autograd.grad(payload, (tokens, weights), gradient)
    apart = (rows.spread(tokens), rows.sort_weights(weights))
    expected = torch.autograd.grad(apart, (tokens, weights), (gradient[:, :40], gradient[:, 40]))
    assert torch.equal(payload[:, :40], apart[0])
    assert torch.equal(payload[:, 40], apart[1])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_operators_have_their_shapes_without_values() -> None:
    rows = assignment(5, 3, torch.device("cpu"))
    values = torch.randn(15, 16)
    torch.library.opcheck(torch.ops.cpt.gather_rows.default, (values, rows.order_R))
    torch.library.opcheck(torch.ops.cpt.combine_rows.default, (values, rows.places_Nk))
    arguments = (torch.randn(5, 16), torch.rand(5, 3), rows.order_R, 8)
    torch.library.opcheck(torch.ops.cpt.pack_rows.default, arguments)


@DTYPES
@pytest.mark.parametrize("num_rows", [0, 11])
def test_gather_into_writes_its_part_of_a_buffer_and_nothing_else(
    num_rows: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    rows = random(num_rows, 48, dtype=dtype, device=kernel_device)
    index = torch.arange(num_rows, device=kernel_device).flip(0)
    buffer = torch.full((num_rows + 4, 48), 7, dtype=dtype, device=kernel_device)
    gather_rows_into(rows, index, buffer[1 : num_rows + 1])
    assert torch.equal(buffer[1 : num_rows + 1], rows.flip(0))
    assert (buffer[:1] == 7).all() and (buffer[num_rows + 1 :] == 7).all()
