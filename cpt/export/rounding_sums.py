"""What rounding to MXFP4 does to a tensor, as sums that pieces and tensors are added up in.

With w the values of the base, `step` what training added to them (both in bf16), and q the exported
values:

    relative error  |q - w - step| / |w + step|
    movement        |step| / |w|
    kept            <q - w, step> / <step, step>: the share of the step that is still there
    noise           |q - w - step| / |step|: what is not the step, as a multiple of it
    changed codes   the share of positions where q is not what the base has in MXFP4

A step that is kept whole has kept 1 and noise 0; kept is above 1 where the rounding enlarges it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch


@dataclass(kw_only=True, slots=True)
class RoundingSums:
    """Sums of one tensor, or of several, in float64."""

    numel: int = 0
    """Values that were rounded."""
    squares: float = 0.0
    """Squares of the values before rounding."""
    error_squares: float = 0.0
    """Squares of what rounding changed."""
    largest_error: float = 0.0
    """The largest change by rounding."""
    compared: int = 0
    """Values that were compared with those of a base."""
    base_squares: float = 0.0
    """Squares of the values of the base."""
    step_squares: float = 0.0
    """Squares of the step."""
    projection: float = 0.0
    """The scalar product of q - w and the step."""
    changed: int = 0
    """Positions at which q is not what the base has in MXFP4."""

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count a piece.

        Args:
            exact: The values before rounding, in bf16.
            rounded: Those after it, in the same shape.
        """
        exact = exact.float()
        error = rounded.float() - exact
        self.numel += exact.numel()
        self.squares += _sum(exact.square())
        self.error_squares += _sum(error.square())
        self.largest_error = max(self.largest_error, float(error.abs().max()))

    def compare(
        self,
        exact: torch.Tensor,
        rounded: torch.Tensor,
        base: torch.Tensor,
        base_rounded: torch.Tensor,
    ) -> None:
        """Compare a piece that was counted with the base; all tensors have the same shape.

        Args:
            exact: The values before rounding, in bf16.
            rounded: Those after it.
            base: Those of the base, in bf16.
            base_rounded: What the base has in MXFP4.
        """
        base_values = base.float()
        step = exact.float() - base_values
        self.compared += step.numel()
        self.base_squares += _sum(base_values.square())
        self.step_squares += _sum(step.square())
        self.projection += _sum((rounded.float() - base_values) * step)
        self.changed += int((rounded != base_rounded).sum())

    def merge(self, other: RoundingSums) -> None:
        """Count the pieces of another tensor, too."""
        largest = max(self.largest_error, other.largest_error)
        for field in fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)
        self.largest_error = largest

    def plain(self) -> dict[str, float]:
        """Return the sums as JSON values, for `RoundingSums(**plain)`."""
        return asdict(self)

    def figures(self) -> dict[str, float | None]:
        """Return the figures of the module's docstring; None for one that is a quotient by zero.

        Without a base there are the errors only.
        """
        found: dict[str, float | None] = {
            "relative_l2_error": _ratio(self.error_squares, self.squares) or 0.0,
            "largest_absolute_error": self.largest_error,
        }
        if not self.compared:
            return found
        has_step = self.step_squares > 0
        found["changed_codes"] = self.changed / self.compared
        found["movement"] = _ratio(self.step_squares, self.base_squares)
        found["kept"] = self.projection / self.step_squares if has_step else None
        found["noise"] = _ratio(self.error_squares, self.step_squares)
        return found


def merged_sums(sums: Iterable[RoundingSums]) -> RoundingSums:
    """Return the sums of several tensors together."""
    total = RoundingSums()
    for one in sums:
        total.merge(one)
    return total


def figures_of_tensors(sums: Mapping[str, RoundingSums]) -> dict[str, Any]:
    """Return the figures of every tensor and of all together, as JSON values."""
    return {
        "all_expert_matrices": merged_sums(sums.values()).figures(),
        "tensors": {name: sums[name].figures() for name in sorted(sums)},
    }


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _ratio(squares: float, of_squares: float) -> float | None:
    return math.sqrt(squares / of_squares) if of_squares > 0 else None
