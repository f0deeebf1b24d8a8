"""The probe of 8-bit products: each kind is compared with float64 before it trains.

A wrong kernel is silent: scales in the wrong order, or of the wrong operand, give a model that
trains badly. So the products of this run answer for themselves, on its device, in its dtype, in the
sizes of its model, an expert without rows included, and with magnitudes that differ between rows,
columns and blocks, so that no scale can take another's place:

    definition    the same rounded operands, multiplied in float64: only the order of the sum and
                  the rounding of the result differ
    exact         the operands before rounding, multiplied in float64: 3.7 % is what rounding costs
                  numbers of a normal distribution, and a definition that is wrong costs more

Shape letters: R rows sorted by expert, E experts, K values along the sum, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cpt.errors import ConfigError
from cpt.model.experts.grouped import Groups, is_served, product
from cpt.model.products.e4m3 import BLOCK, rounded
from cpt.model.products.layers import ChosenProducts, EightBitMatrix
from cpt.model.products.recipe import EightBit

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative l2 error of a product against its definition."""
LIMIT_TO_EXACT = 0.06
"""Largest relative l2 error against operands that are not rounded."""
COUNTS = (70, 0, 33, 1)
"""Rows of each expert."""
LARGEST_SHIFT = 2
"""Magnitudes of an index, and of a block of them, differ by up to 2 to the power of twice this."""
MOST_COLUMNS = 320
"""Columns of a matrix that are multiplied; no multiple of 128, as gpt-oss's sizes are none."""


@dataclass(frozen=True, slots=True)
class ProductError:
    """The errors of one product."""

    case: str
    """Its matrix and direction."""
    to_definition: float
    """Relative l2 error against the definition in float64."""
    to_exact: float
    """Relative l2 error against operands that are not rounded."""
    limit: float
    """The largest error against the definition that is accepted."""

    @property
    def passed(self) -> bool:
        """Whether both errors are within their limits; NaN is not."""
        return self.to_definition <= self.limit and self.to_exact <= LIMIT_TO_EXACT


def run_probe(
    chosen: ChosenProducts,
    matrices: tuple[EightBitMatrix, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ProductError, ...]:
    """Compare the 8-bit products of a run with their definition, and refuse wrong ones.

    Args:
        chosen: How they are computed.
        matrices: What `eight_bit_matrices` returns.
        device: Where they run.
        dtype: The working precision.

    Raises:
        ConfigError: one is off, and the message has a line for each; or one does not run.
    """
    try:
        findings = tuple(measure(chosen, matrices, device, dtype))
    except Exception as error:
        raise ConfigError(
            f"train.products: products in 8 bits do not run on {device} in {dtype}: "
            f"{type(error).__name__}: {error}. Give another train.products.scaling, or remove "
            "train.products."
        ) from error
    if not all(finding.passed for finding in findings):
        lines = ["train.products: a product in 8 bits is not what it is defined to be."]
        for finding in findings:
            mark = "" if finding.passed else " !"
            lines.append(
                f"{finding.case}: off by {finding.to_definition:.1e} from its definition (limit "
                f"{finding.limit:.0e}), by {finding.to_exact:.1e} from the exact product (limit "
                f"{LIMIT_TO_EXACT:.0e}){mark}"
            )
        lines.append("Remove train.products, or try another version of torch.")
        raise ConfigError("\n".join(lines))
    return findings


def measure(
    chosen: ChosenProducts,
    matrices: tuple[EightBitMatrix, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[ProductError]:
    """Yield the errors of both products with each matrix."""
    draw = _Drawing(device, dtype)
    for matrix in matrices:
        eight_bit = chosen.experts if matrix.of_experts else chosen.attention
        assert eight_bit is not None, matrix.name
        columns = min(matrix.outputs, MOST_COLUMNS)
        experts = len(COUNTS) if matrix.of_experts else 1
        weights_EKN = draw.operand(experts, matrix.inputs, columns)
        for direction, right in (
            ("forward", weights_EKN),
            ("gradient of the input", weights_EKN.transpose(1, 2)),
        ):
            rows_RK = draw.operand(sum(COUNTS), right.shape[1])
            case = f"{matrix.name}, {direction}"
            yield _compared(case, rows_RK, right, eight_bit)


class _Drawing:
    """Random operands, the same on every rank."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device = device
        self._dtype = dtype

    def operand(self, *shape: int) -> torch.Tensor:
        """Return normal numbers, times a power of two for each index and for each 32 of them."""
        values = torch.randn(*shape, generator=self._generator)
        for axis in (-2, -1):
            size = shape[axis]
            exponents = self._exponents(size) + self._exponents(-(-size // BLOCK), BLOCK)[:size]
            factors = exponents.exp2()
            values = values * (factors[:, None] if axis == -2 else factors)
        return values.to(self._device, self._dtype)

    def _exponents(self, size: int, repeats: int = 1) -> torch.Tensor:
        drawn = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (size,), generator=self._generator)
        return drawn.repeat_interleave(repeats)


def _compared(
    case: str, rows_RK: torch.Tensor, right_EKN: torch.Tensor, eight_bit: EightBit
) -> ProductError:
    of_experts = right_EKN.shape[0] > 1
    counts = COUNTS if of_experts else (sum(COUNTS),)
    if of_experts:
        grouped = is_served(rows_RK, *right_EKN.shape[1:])
        groups = Groups(torch.tensor(counts, device=rows_RK.device))
        got_RN = product(rows_RK, right_EKN, groups, grouped=grouped, eight_bit=eight_bit)
    else:
        got_RN = eight_bit.linear_product(rows_RK, right_EKN[0].t())
    rounded_rows = rounded(rows_RK, 1, eight_bit.scaling)
    rounded_right = rounded(right_EKN, 1, eight_bit.scaling)
    definition_RN = _in_float64(rounded_rows, rounded_right, counts)
    exact_RN = _in_float64(rows_RK, right_EKN, counts)
    limit = LIMITS[rows_RK.dtype]
    return ProductError(case, _error(got_RN, definition_RN), _error(got_RN, exact_RN), limit)


def _in_float64(
    rows_RK: torch.Tensor, right_EKN: torch.Tensor, counts: tuple[int, ...]
) -> torch.Tensor:
    parts = []
    for rows, matrix in zip(rows_RK.double().split(counts), right_EKN.double(), strict=True):
        parts.append(rows @ matrix)
    return torch.cat(parts)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
