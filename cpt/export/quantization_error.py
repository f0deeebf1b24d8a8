"""The error that rounding to MXFP4 makes in each tensor, as JSON and as table rows."""

from __future__ import annotations

import math
from typing import Any

import torch


class TensorError:
    """Error sums of one tensor, gathered over its pieces."""

    def __init__(self) -> None:
        self._error_squares = 0.0
        self._squares = 0.0
        self._largest = 0.0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count a piece; both tensors have the same shape."""
        difference = rounded.float() - exact.float()
        self._error_squares += float(difference.square().sum(dtype=torch.float64))
        self._squares += float(exact.float().square().sum(dtype=torch.float64))
        self._largest = max(self._largest, float(difference.abs().max()))

    def merge(self, other: TensorError) -> None:
        """Count the pieces of another tensor, too."""
        self._error_squares += other._error_squares
        self._squares += other._squares
        self._largest = max(self._largest, other._largest)

    def to_json(self) -> dict[str, float]:
        """Return the relative l2 error and the largest absolute error."""
        relative = math.sqrt(self._error_squares / self._squares) if self._squares else 0.0
        return {"relative_l2_error": relative, "largest_absolute_error": self._largest}


def quantization_report(errors: dict[str, TensorError]) -> dict[str, Any]:
    """Return the errors of every tensor and of all together, as JSON values."""
    all_tensors = TensorError()
    for error in errors.values():
        all_tensors.merge(error)
    return {
        "all_expert_matrices": all_tensors.to_json(),
        "tensors": {name: error.to_json() for name, error in sorted(errors.items())},
    }


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the report as rows: tensor, relative error in percent, largest absolute error."""
    errors = {**report["tensors"], "all expert matrices": report["all_expert_matrices"]}
    rows = []
    for name, error in errors.items():
        percent = f"{100 * error['relative_l2_error']:.3f}"
        rows.append((name, percent, f"{error['largest_absolute_error']:.3g}"))
    return rows
