"""Products of experts in bf16 on a CPU are those of each expert's rows alone, at few sizes.

The tolerance is bf16's rounding of a result, 2^-8 of the largest, where the order of an fp32 sum
decides it.  Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpt.model.experts.grouped import Groups, outer, product
from cpt.model.experts.padded_products import padded_size

K = 48
N = 40
COUNTS = {
    "no row": [0, 0, 0],
    "one row": [0, 1, 0],
    "few before many": [1, 2, 3, 90],
    "none in between": [40, 0, 5, 0, 130, 17],
    "sizes as they are": [16, 32, 64, 128],
    "all on the last": [0, 0, 37],
}
ROUNDING = 2**-8


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        difference = (found.double() - expected).abs()
        limit = ROUNDING * float(expected.abs().max())
        assert difference.max() <= limit, f"max {difference.max()}, mean {difference.mean()}"


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_products_and_sums_over_rows_are_those_of_the_rows_of_each_expert(
    counts: list[int],
) -> None:
    groups = Groups(torch.tensor(counts))
    rows_RK = drawn(sum(counts), K)
    others_RN = drawn(sum(counts), N)
    matrices_EKN = drawn(len(counts), K, N)
    rows = rows_RK.double().split(counts)
    others = others_RN.double().split(counts)
    matrices = matrices_EKN.double()
    products = [part @ matrix for part, matrix in zip(rows, matrices, strict=True)]
    sums = [left.t() @ right for left, right in zip(rows, others, strict=True)]
    assert_close(product(rows_RK, matrices_EKN, groups, grouped=True), torch.cat(products))
    assert_close(outer(rows_RK, others_RN, groups, grouped=True), torch.stack(sums))


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
def test_an_expert_gets_the_same_bits_whoever_stands_before_it(transposed: bool) -> None:
    """Alone, its rows are copied; behind others, those are computed as well and thrown away."""
    matrices_EKN = drawn(2, N, K).transpose(1, 2) if transposed else drawn(2, K, N)
    for num_rows in (1, 15, 17, 100, 131, 300):
        rows_RK = drawn(num_rows, K)
        before_RK = drawn(400, K)
        before_RK[-1] = torch.nan
        both_RK = torch.cat([before_RK, rows_RK])
        behind = product(both_RK, matrices_EKN, Groups(torch.tensor([400, num_rows])), grouped=True)
        alone = product(rows_RK, matrices_EKN[1:], Groups(torch.tensor([num_rows])), grouped=True)
        assert torch.equal(behind[400:], alone)
        assert torch.isfinite(alone).all()


def test_sums_of_an_expert_hold_nothing_of_the_rows_of_others() -> None:
    rows_RK = drawn(50, K)
    rows_RK[20:] = torch.inf
    sums_EKN = outer(rows_RK, drawn(50, N), Groups(torch.tensor([20, 30])), grouped=True)
    assert torch.isfinite(sums_EKN[0]).all() and not torch.isfinite(sums_EKN[1]).any()


@pytest.mark.parametrize("num_rows", [1, 16, 17, 128, 129, 255, 257, 1000, 4096, 100_003])
def test_rows_grow_by_less_than_an_eighth_or_to_a_multiple_of_16(num_rows: int) -> None:
    size = padded_size(num_rows)
    assert size % 16 == 0
    assert num_rows <= size < num_rows + max(16, num_rows / 8)
    assert padded_size(size) == size


class _Sizes(TorchDispatchMode):
    """Notes the operands' shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.Size, torch.Size]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.found.add((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


def test_no_router_makes_more_sizes_than_eight_for_each_power_of_two() -> None:
    """oneDNN compiles for each size of the operands once, so this is what a run compiles."""
    generator = torch.Generator().manual_seed(0)
    sizes = _Sizes()
    with sizes:
        for _ in range(40):
            # squared, so that some experts get few rows and some many
            shares_E = torch.rand(8, generator=generator).square()
            choice_R = torch.multinomial(shares_E, 900, replacement=True, generator=generator)
            counts = torch.bincount(choice_R, minlength=8)
            groups = Groups(counts)
            rows_RK = drawn(900, K)
            product(rows_RK, drawn(8, K, N), groups, grouped=True)
            outer(rows_RK, drawn(900, N), groups, grouped=True)
    num_rows = {left[0] for left, right in sizes.found if right == (K, N)}
    assert len(num_rows) <= 8 * 4, sorted(num_rows)
    assert len(sizes.found) <= 2 * 8 * 4
