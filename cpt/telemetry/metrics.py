"""metrics.jsonl and what else hears of an event; only rank 0 writes.

A run that resumes from an older step appends; readers take the last line of a step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Something that shows events to people."""

    def log(self, event: dict[str, Any]) -> None:
        """Show one event."""

    def close(self) -> None:
        """Flush and leave."""


class Telemetry:
    """Appends events to a file and hands them to trackers; without a file (ranks other than 0) it does nothing."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 (lives as long as the run)
        self._trackers = trackers

    def log(self, event: dict[str, Any]) -> None:
        """Write one event as a JSON line, at once."""
        if self._file is None:
            return
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(event)

    def close(self) -> None:
        """Close file and trackers."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl; a cut-off last line, as a crash leaves it, is passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
