"""Events on their way to metrics.jsonl, which only the main thread writes."""

from __future__ import annotations

from collections import deque
from typing import Any


class EventMailbox:
    """Events that any thread may post and that the main thread collects after each step.

    The operations of a deque are atomic, so no lock is needed.
    """

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque()

    def post(self, event: dict[str, Any]) -> None:
        """Leave an event for metrics.jsonl."""
        self._events.append(event)

    def collect(self) -> list[dict[str, Any]]:
        """Remove and return the events posted since the last call, oldest first."""
        return [self._events.popleft() for _ in range(len(self._events))]
