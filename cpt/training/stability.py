"""What a loss and a gradient norm say about the run: sound, a spike, or not finite, and what
follows.

A step that is not finite
    counts as done: its rows are consumed, the schedule goes on, but no rank applies the update and
    Adam's step count stays.  `LIMIT_IN_A_ROW` of them in a row ask for a rollback.

A spike
    is a step whose loss and gradient norm both lie more than 6 standard deviations above the mean
    of the last 128 sound steps.  It is told, nothing else: a change of the mix also moves the loss.
     It does not enter the windows, so the next normal step is not measured against it; after
     `NEW_LEVEL` spikes in a row they are the new normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

WINDOW_STEPS = 128
MIN_STEPS = 16
"""Sound steps before anything is called a spike: a deviation of fewer values says nothing."""
SIGMAS = 6.0
LIMIT_IN_A_ROW = 3
NEW_LEVEL = 8

Verdict = Literal["sound", "spike", "skipped", "rollback"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Above both of these a step is a spike."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Global norm before clipping."""


class Stability:
    """The windows and counters of one run; the same on every rank, because they see reduced values
    only.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.restore(state)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to what `to_json` gave; None is the beginning of a run."""
        plain = state or {}
        self._losses: list[float] = list(plain.get("losses", []))
        self._norms: list[float] = list(plain.get("grad_norms", []))
        self._spikes: list[tuple[float, float]] = [
            (loss, norm) for loss, norm in plain.get("spikes", [])
        ]
        self.skipped_in_a_row = int(plain.get("skipped_in_a_row", 0))
        """Steps without an update since the last one with."""
        self.skipped_total = int(plain.get("skipped_total", 0))
        """Steps without an update since step 0."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": self._losses,
            "grad_norms": self._norms,
            "spikes": [list(spike) for spike in self._spikes],
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_total": self.skipped_total,
        }

    def limits(self) -> Limits:
        """What the next step is measured against; infinite while too little is known."""
        if len(self._losses) < MIN_STEPS:
            return Limits(loss=math.inf, grad_norm=math.inf)
        return Limits(loss=_limit(self._losses), grad_norm=_limit(self._norms))

    def judge(self, loss: float, grad_norm: float, *, applied: bool) -> Verdict:
        """Take one step's reduced loss and gradient norm into account."""
        if not applied:
            self.skipped_in_a_row += 1
            self.skipped_total += 1
            return "rollback" if self.skipped_in_a_row >= LIMIT_IN_A_ROW else "skipped"
        self.skipped_in_a_row = 0
        limits = self.limits()
        if loss > limits.loss and grad_norm > limits.grad_norm:
            self._spikes.append((loss, grad_norm))
            if len(self._spikes) >= NEW_LEVEL:
                self._losses, self._norms = (
                    [*column] for column in zip(*self._spikes, strict=True)
                )
                self._spikes = []
            return "spike"
        self._spikes = []
        self._losses = [*self._losses, loss][-WINDOW_STEPS:]
        self._norms = [*self._norms, grad_norm][-WINDOW_STEPS:]
        return "sound"


def _limit(values: list[float]) -> float:
    return float(np.mean(values) + SIGMAS * np.std(values))
