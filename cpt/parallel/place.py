"""Where this rank is in its work, written by the main thread and read by the watchdog's."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

RECENT_STEPS = 64
"""Steps whose median is what a step usually takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One rank's place at one moment."""

    count: int
    """Phases entered so far.  All ranks enter the same phases in the same order, so the lowest
    count is behind.
    """
    phase: str
    """load, data, forward, backward, gradient, optimizer_step, evaluate, sample, save, rollback or
    export.
    """
    step: int
    """The optimizer step that is being done, counted from 1; 0 before the first."""


class Place:
    """The position of this rank."""

    def __init__(self) -> None:
        self._position = Position(count=0, phase="load", step=0)
        self._reports: deque[dict[str, Any]] = deque()
        self._data_seconds = 0.0
        self._step_started = 0.0
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def enter(self, phase: str, step: int) -> None:
        """Say what comes next; a single assignment, so that a reader never sees half of it."""
        if step != self._position.step:
            now = time.monotonic()
            if step == self._position.step + 1 and self._position.step > 0:
                self._step_seconds.append(now - self._step_started)
            self._step_started = now
        self._position = Position(count=self._position.count + 1, phase=phase, step=step)

    def now(self) -> Position:
        """The present position."""
        return self._position

    def waited_for_data(self, seconds: float) -> None:
        """Count time in which this rank could do nothing but read."""
        self._data_seconds += seconds

    def take_data_seconds(self) -> float:
        """Seconds counted since the last call."""
        taken, self._data_seconds = self._data_seconds, 0.0
        return taken

    def report(self, event: dict[str, Any]) -> None:
        """Leave an event for metrics.jsonl, which only the main thread writes."""
        self._reports.append(event)

    def take_reports(self) -> list[dict[str, Any]]:
        """Events left since the last call."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def median_step_seconds(self) -> float | None:
        """What a step usually takes; None before there were three."""
        seconds = list(self._step_seconds)
        return statistics.median(seconds) if len(seconds) >= 3 else None
