"""What rounding to MXFP4 costs each tensor, as numbers and as a table."""

from __future__ import annotations

import math
from typing import Any

import torch


class ErrorOfTensor:
    """Sums over the pieces of one tensor."""

    def __init__(self) -> None:
        self._error_squares = self._squares = self._largest = 0.0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count a piece; both tensors have the same shape."""
        difference = rounded.float() - exact.float()
        self._error_squares += float(difference.square().sum(dtype=torch.float64))
        self._squares += float(exact.float().square().sum(dtype=torch.float64))
        self._largest = max(self._largest, float(difference.abs().max()))

    def to_json(self) -> dict[str, float]:
        """Relative l2 error, and the largest absolute one."""
        relative = math.sqrt(self._error_squares / self._squares) if self._squares else 0.0
        return {"relative_l2_error": relative, "largest_absolute_error": self._largest}

    def __add__(self, other: ErrorOfTensor) -> ErrorOfTensor:
        both = ErrorOfTensor()
        both._error_squares = self._error_squares + other._error_squares
        both._squares = self._squares + other._squares
        both._largest = max(self._largest, other._largest)
        return both


def quantisation_report(errors: dict[str, ErrorOfTensor]) -> dict[str, Any]:
    """Errors of every tensor and of all together, for a JSON file."""
    everything = sum(errors.values(), start=ErrorOfTensor())
    return {
        "all_expert_matrices": everything.to_json(),
        "tensors": {name: error.to_json() for name, error in sorted(errors.items())},
    }


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The report as table rows: tensor, relative error in percent, largest absolute error."""
    rows = {**report["tensors"], "all expert matrices": report["all_expert_matrices"]}
    return [
        (name, f"{100 * row['relative_l2_error']:.3f}", f"{row['largest_absolute_error']:.3g}")
        for name, row in rows.items()
    ]
