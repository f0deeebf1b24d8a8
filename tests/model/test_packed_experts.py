"""Products with packed experts are those with the decoded matrices, bit for bit.

Shape letters: R rows, E experts, M model size, I expert size.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from cpt.model.experts import packed
from cpt.model.experts.function import Activation, Parameters, apply_experts
from cpt.model.experts.grouped import Groups, product
from cpt.model.experts.packed import PackedMatrices
from cpt.model.products.recipe import EightBit
from cpt.model.weights import mxfp4

EXPERTS = 8
INPUTS = 96
OUTPUTS = 64
ACTIVATION = Activation(1.702, 7.0)
COUNTS = {
    "all experts have rows": (9, 1, 11, 3, 2, 5, 20, 7),
    "some have none": (9, 0, 11, 3, 0, 0, 20, 0),
    "one row in all": (0, 0, 0, 0, 0, 1, 0, 0),
    "no rows": (0,) * EXPERTS,
}

every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
every_dtype = pytest.mark.parametrize(
    ("dtype", "grouped"),
    [
        (torch.bfloat16, True),
        (torch.float32, True),
        (torch.float32, False),
        (torch.float64, False),
    ],
    ids=str,
)


@pytest.fixture
def experts_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(packed, "experts_in_scratch", lambda *_: request.param)
    return int(request.param)


def draw(*sizes: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed_and_decoded(
    inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[PackedMatrices, torch.Tensor]:
    blocks, scales = mxfp4.encode(draw(EXPERTS, inputs, outputs, dtype=torch.float32) / 8)
    return PackedMatrices(blocks, scales), mxfp4.decode(blocks, scales, dtype)


@every_count
@every_dtype
@pytest.mark.parametrize("experts_at_a_time", [1, 3, 8], indirect=True)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
def test_product_with_packed_experts_has_the_bits_of_the_decoded_ones(
    counts: tuple[int, ...],
    dtype: torch.dtype,
    grouped: bool,
    experts_at_a_time: int,
    transposed: bool,
) -> None:
    codes, values = packed_and_decoded(INPUTS, OUTPUTS, dtype)
    if transposed:
        codes = codes.transpose(1, 2)
        values = values.transpose(1, 2)
    groups = Groups(torch.tensor(counts))
    rows = draw(sum(counts), values.shape[1], dtype=dtype)
    found = product(rows, codes, groups, grouped=grouped)
    assert codes.shape == values.shape
    assert torch.equal(found, product(rows, values, groups, grouped=grouped))


@pytest.mark.parametrize("experts_at_a_time", [3], indirect=True)
def test_one_piece_of_decoded_experts_is_held_at_a_time(
    experts_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    at_a_time = []

    def decode(matrices: PackedMatrices, dtype: torch.dtype) -> torch.Tensor:
        at_a_time.append(len(held) + 1)
        values = original(matrices, dtype)
        held.add(values)
        return values

    original = PackedMatrices.decoded
    monkeypatch.setattr(PackedMatrices, "decoded", decode)
    codes, _ = packed_and_decoded(INPUTS, OUTPUTS, torch.float32)
    counts = torch.tensor(COUNTS["all experts have rows"])
    rows = draw(int(counts.sum()), INPUTS, dtype=torch.float32)
    product(rows, codes, Groups(counts), grouped=False)
    assert at_a_time == [1, 1, 1]


@every_dtype
@pytest.mark.parametrize("experts_at_a_time", [3], indirect=True)
@pytest.mark.parametrize("scaling", ["rows", "blocks"])
def test_8_bit_product_with_packed_experts_has_the_bits_of_the_decoded_ones(
    dtype: torch.dtype, grouped: bool, experts_at_a_time: int, scaling: Any
) -> None:
    codes, values = packed_and_decoded(INPUTS, OUTPUTS, dtype)
    counts = (9, 0, 11, 3, 0, 0, 20, 7)
    groups = Groups(torch.tensor(counts))
    eight_bit = EightBit(scaling)
    for turned in (False, True):
        left = codes.transpose(1, 2) if turned else codes
        right = values.transpose(1, 2) if turned else values
        rows = draw(sum(counts), right.shape[1], dtype=dtype)
        found = product(rows, left, groups, grouped=grouped, eight_bit=eight_bit)
        expected = product(rows, right, groups, grouped=grouped, eight_bit=eight_bit)
        assert torch.equal(found, expected)
        assert not torch.equal(found, product(rows, right, groups, grouped=grouped))


@every_dtype
@pytest.mark.parametrize("experts_at_a_time", [3], indirect=True)
def test_experts_over_packed_matrices_have_the_bits_of_the_decoded_ones(
    dtype: torch.dtype, grouped: bool, experts_at_a_time: int
) -> None:
    """Outputs, and the gradients of rows, routing weights and biases."""
    model_size, expert_size = 64, 96
    gate_up = packed_and_decoded(model_size, 2 * expert_size, dtype)
    down = packed_and_decoded(expert_size, model_size, dtype)
    counts = (9, 0, 11, 3, 0, 0, 20, 7)
    results = []
    for form in (0, 1):
        leaves = {
            "rows": draw(sum(counts), model_size, dtype=dtype),
            "weights": draw(sum(counts), dtype=dtype, seed=4),
            "gate_up_bias": draw(EXPERTS, 2 * expert_size, dtype=dtype, seed=5),
            "down_bias": draw(EXPERTS, model_size, dtype=dtype, seed=6),
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        parameters = Parameters(
            gate_up[form], leaves["gate_up_bias"], down[form], leaves["down_bias"]
        )
        out = apply_experts(
            leaves["rows"],
            leaves["weights"],
            Groups(torch.tensor(counts)),
            parameters,
            ACTIVATION,
            grouped=grouped,
        )
        out.backward(draw(*out.shape, dtype=dtype, seed=7))
        results.append({"out": out.detach()} | {name: x.grad for name, x in leaves.items()})
    of_codes, of_values = results
    for name, expected in of_values.items():
        assert expected.abs().sum() > 0, name
        assert torch.equal(of_codes[name], expected), name


def test_scratch_holds_as_many_experts_as_fit_and_always_one() -> None:
    numel = packed.SCRATCH_BYTES["cpu"] // (3 * 2)
    assert packed.experts_in_scratch(numel, torch.bfloat16, "cpu") == 3
    assert packed.experts_in_scratch(numel + 1, torch.bfloat16, "cpu") == 2
    assert packed.experts_in_scratch(9 * numel, torch.float32, "cpu") == 1


def test_a_product_decodes_only_the_experts_that_have_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, _ = packed_and_decoded(INPUTS, OUTPUTS, torch.float32)
    decoded = []
    whole = PackedMatrices.decoded

    def counting(self: PackedMatrices, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(self.shape[0])
        return whole(self, dtype)

    monkeypatch.setattr(PackedMatrices, "decoded", counting)
    groups = Groups(torch.tensor([0, 2, 0, 0, 0, 0, 1, 0]))
    product(draw(3, INPUTS, dtype=torch.float32), codes, groups, grouped=True)
    assert decoded == [2]
