"""The phase of work that this rank is in, written by the main thread and read by the watchdog's."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

RECENT_STEPS = 64
"""Number of recent steps that the median duration of a step is taken over."""
MIN_STEPS = 3
"""Number of completed steps from which on the median is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRecord:
    """The phase of one rank at one moment."""

    count: int
    """Number of phases entered so far. All ranks enter the same phases in the same order, so the
    rank with the lowest count is behind.
    """
    phase: str
    """load, network, data, forward, backward, gradient, optimizer_step, rounding, evaluate,
    sample, save, rollback or export.
    """
    step: int
    """The optimizer step in progress, counted from 1; 0 before the first."""


class PhaseClock:
    """Keeps the present phase of this rank and measures how long a step usually takes."""

    def __init__(self) -> None:
        self._record = PhaseRecord(count=0, phase="load", step=0)
        self._step_started = 0.0
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def enter(self, phase: str, step: int) -> None:
        """Record that `phase` of `step` begins.

        The record is replaced by a single assignment, so another thread never reads half of it.
        """
        previous = self._record
        if step != previous.step:
            now = time.monotonic()
            if step == previous.step + 1 and previous.step > 0:
                self._step_seconds.append(now - self._step_started)
            self._step_started = now
        self._record = PhaseRecord(count=previous.count + 1, phase=phase, step=step)

    def now(self) -> PhaseRecord:
        """Return the present phase."""
        return self._record

    def median_step_seconds(self) -> float | None:
        """Return the usual duration of a step, or None before `MIN_STEPS` steps were completed."""
        seconds = list(self._step_seconds)
        if len(seconds) < MIN_STEPS:
            return None
        return statistics.median(seconds)
