"""Whether a step was sound, a spike, or not finite, by its loss and its gradient norm.

A step that is not finite
    counts as done: its rows are consumed and the schedule goes on, but no rank applies the update,
    and Adam's step count stays. `ROLLBACK_AFTER` such steps in a row ask for a rollback.

A spike
    is a step whose loss and gradient norm both lie more than 6 standard deviations above the mean
    of the last 128 sound steps. It is logged and has no other effect, because a change of the mix
    moves the loss, too. It does not enter the windows, so the next normal step is not measured
    against it. `NEW_LEVEL_AFTER` spikes in a row become the new normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

WINDOW_STEPS = 128
MIN_STEPS = 16
"""Sound steps before anything counts as a spike; the deviation of fewer values says nothing."""
SIGMAS = 6.0
ROLLBACK_AFTER = 3
"""Steps in a row that are not finite before a rollback."""
NEW_LEVEL_AFTER = 8
"""Spikes in a row that become the new normal."""

StepOutcome = Literal["sound", "spike", "skipped", "rollback"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeLimits:
    """The values that a step must both exceed to count as a spike."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Global norm before clipping."""


class Stability:
    """The windows and counters of one run.

    They are the same on every rank, because only reduced values enter them.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """Begin, or go on from what `to_json` returned."""
        self.restore(state)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to what `to_json` returned; None is the beginning of a run."""
        plain = state or {}
        self._losses: list[float] = list(plain.get("losses", []))
        self._norms: list[float] = list(plain.get("grad_norms", []))
        self._spikes: list[tuple[float, float]] = []
        for loss, norm in plain.get("spikes", []):
            self._spikes.append((loss, norm))
        self.skipped_in_a_row = int(plain.get("skipped_in_a_row", 0))
        """Steps without an update since the last step with one."""
        self.skipped_total = int(plain.get("skipped_total", 0))
        """Steps without an update since step 0."""

    def to_json(self) -> dict[str, Any]:
        """Return the windows and counters as a checkpoint keeps them."""
        return {
            "losses": self._losses,
            "grad_norms": self._norms,
            "spikes": [list(spike) for spike in self._spikes],
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_total": self.skipped_total,
        }

    def limits(self) -> SpikeLimits:
        """Return the limits of the next step; they are infinite while too little is known."""
        if len(self._losses) < MIN_STEPS:
            return SpikeLimits(loss=math.inf, grad_norm=math.inf)
        return SpikeLimits(loss=_limit(self._losses), grad_norm=_limit(self._norms))

    def assess(self, loss: float, grad_norm: float, *, applied: bool) -> StepOutcome:
        """Take a step's reduced loss and gradient norm into account and say what the step was."""
        if not applied:
            self.skipped_in_a_row += 1
            self.skipped_total += 1
            return "rollback" if self.skipped_in_a_row >= ROLLBACK_AFTER else "skipped"
        self.skipped_in_a_row = 0
        limits = self.limits()
        if loss > limits.loss and grad_norm > limits.grad_norm:
            self._spikes.append((loss, grad_norm))
            if len(self._spikes) >= NEW_LEVEL_AFTER:
                self._losses = [spike_loss for spike_loss, _ in self._spikes]
                self._norms = [spike_norm for _, spike_norm in self._spikes]
                self._spikes = []
            return "spike"
        self._spikes = []
        self._losses = [*self._losses, loss][-WINDOW_STEPS:]
        self._norms = [*self._norms, grad_norm][-WINDOW_STEPS:]
        return "sound"


def _limit(values: list[float]) -> float:
    return float(np.mean(values) + SIGMAS * np.std(values))
