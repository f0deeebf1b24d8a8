"""Where this rank is in its work, written by the main thread and read by the watchdog's."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One rank's place at one moment."""

    count: int
    """Phases entered so far.  All ranks enter the same phases in the same order, so the lowest count is behind."""
    phase: str
    """load, data, forward, backward, gradient, optimizer_step, evaluate, save, rollback or export."""
    step: int
    """The optimizer step that is being done, counted from 1; 0 before the first."""
    since: float
    """Seconds of this process's monotonic clock at which the phase was entered."""


class Place:
    """The position of this rank."""

    def __init__(self) -> None:
        self._position = Position(count=0, phase="load", step=0, since=time.monotonic())

    def enter(self, phase: str, step: int) -> None:
        """Say what comes next; a single assignment, so that a reader never sees half of it."""
        self._position = Position(count=self._position.count + 1, phase=phase, step=step, since=time.monotonic())

    def now(self) -> Position:
        """The present position."""
        return self._position
