"""The log of a run: metrics.jsonl, and the trackers that hear of every event.

Only rank 0 writes.  A run that resumes from an older step appends; readers take the last line of a
step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO


class Tracker(Protocol):
    """A service that shows events to people."""

    def log(self, event: dict[str, Any]) -> None:
        """Show one event."""

    def close(self) -> None:
        """Send what is left and close the connection."""


class Telemetry:
    """Appends events to a file and hands them to trackers; without a file (ranks other than 0) it
    does nothing.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.previous_end = path.stat().st_mtime if path and path.is_file() else None
        """Time of the last line of an earlier start; None if there was none."""
        self._file = _open_at_line_start(path) if path else None
        self._trackers = trackers

    def log(self, event: dict[str, Any]) -> None:
        """Write one event as a JSON line, at once."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite(event), allow_nan=False) + "\n")
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


def _open_at_line_start(path: Path) -> TextIO:
    """Open a file to append to it, and first end a line that a crash cut off.

    Otherwise the next event would be lost with that line.
    """
    # the file is open as long as the run goes on
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null, since JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read all events of a metrics.jsonl; a line that a crash cut off is passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
