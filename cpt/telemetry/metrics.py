"""The log of a run: metrics.jsonl, and the trackers that hear of every event.

Only rank 0 writes.  A run that resumes from an older step appends; readers take the last line of a
step.  Neither the file nor a tracker can end a run: lines that cannot be written wait in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cpt.resilience.best_effort import reason_of
from cpt.telemetry.event_reader import iter_events
from cpt.telemetry.goodput import Goodput
from cpt.telemetry.json_values import finite
from cpt.telemetry.running_goodput import RunningGoodput
from data_pipeline.store.files import no_links

log = logging.getLogger("cpt.telemetry.metrics")

MOST_WAITING_BYTES = 64 * 2**20
"""Lines that wait in memory while the file cannot be written; the oldest are lost beyond that."""


class Listener(Protocol):
    """Something that hears of every event and neither raises nor blocks."""

    def log(self, event: dict[str, Any]) -> None:
        """Take one event."""

    def close(self, longest_seconds: float) -> None:
        """Finish within this time."""


class Telemetry:
    """Appends events to a file and hands them to trackers; without a file (ranks other than 0) it
    does nothing.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Listener] = ()) -> None:
        self.previous_end = _time_of(path) if path is not None else None
        """Time of the last line of an earlier start; None if there was none."""
        self._file = MetricsFile(path) if path is not None else None
        self._goodput = RunningGoodput(path) if path is not None else None
        self._trackers = trackers

    def log(self, event: dict[str, Any]) -> None:
        """Write one event as a JSON line, at once."""
        if self._file is None:
            return
        self._file.append(json.dumps(finite(event), allow_nan=False, default=str))
        self.show(event)

    def show(self, event: dict[str, Any]) -> None:
        """Hand an event that is written elsewhere to the trackers."""
        for tracker in self._trackers:
            tracker.log(event)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events of the run, those that wait to be written included.

        Raises:
            OSError: the file cannot be read.
        """
        if self._file is not None:
            yield from self._file.events()

    def goodput_share(self) -> float:
        """Return the productive share of all time so far; see `RunningGoodput.share`."""
        return math.nan if self._goodput is None else self._goodput.share()

    def goodput(self, longest_seconds: float = math.inf) -> Goodput | None:
        """Return the account of all starts of the run, with events that wait to be written.

        Returns:
            None if what was not read yet takes longer to read, or without a file.

        Raises:
            OSError: the file cannot be read.
        """
        if self._file is None or self._goodput is None:
            return None
        return self._goodput.result(list(self._file.waiting()), longest_seconds)

    def close(self, longest_seconds: float = math.inf) -> None:
        """Close file and trackers.

        Args:
            longest_seconds: Longest wait for each tracker; they have their own limits, too.
        """
        for tracker in self._trackers:
            tracker.close(longest_seconds)
        self._trackers = ()
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsFile:
    """A file of JSON lines that is appended to whenever it can be.

    It is opened for every write, so that a folder that vanished is noticed, and one that came back
    is found.  A line that was cut off, by a crash or by a full disk, is taken back or ended before
    the next one is written, which would otherwise be lost with it.
    """

    def __init__(self, path: Path, most_waiting_bytes: int = MOST_WAITING_BYTES) -> None:
        self._path = path
        self._most_waiting_bytes = most_waiting_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._num_lost = 0
        self._is_failing = False
        self._flush()

    def append(self, line: str) -> None:
        """Write a line, after those that wait; keep it if that fails."""
        data = line.encode("utf-8") + b"\n"
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._flush()
        while self._waiting_bytes > self._most_waiting_bytes:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._num_lost += 1

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the file and those that wait.

        Raises:
            OSError: the file cannot be read.
        """
        yield from iter_events(self._path)
        yield from self.waiting()

    def waiting(self) -> Iterator[dict[str, Any]]:
        """Yield the events that wait to be written."""
        for line in self._waiting:
            yield json.loads(line)

    def close(self) -> None:
        """Try a last time to write what waits, and tell what was lost."""
        self._flush()
        num_lost = self._num_lost + len(self._waiting)
        if num_lost:
            log.warning("%s: %d lines could not be written and are lost.", self._path, num_lost)
        self._waiting.clear()

    def _flush(self) -> None:
        try:
            append_bytes(self._path, b"".join(self._waiting))
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    "%s cannot be written (%s). Its lines are kept in memory and tried again; "
                    "training goes on.",
                    self._path,
                    reason_of(error),
                )
            self._is_failing = True
            return
        if self._is_failing:
            log.info("%s is written again: %d lines had waited", self._path, len(self._waiting))
        self._is_failing = False
        self._waiting.clear()
        self._waiting_bytes = 0


def append_bytes(path: Path, data: bytes) -> None:
    """Append to a file, all or nothing.

    Raises:
        OSError: nothing was appended, or a cut-off line that the next call ends.
    """
    with open(path, "a+b", buffering=0, opener=no_links) as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _time_of(path: Path) -> float | None:
    """Return when a file was written last; None if there is none or it cannot be asked."""
    try:
        return path.stat().st_mtime if path.is_file() else None
    except OSError:
        return None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read all events of a metrics.jsonl; see `iter_events`, which needs less memory.

    Raises:
        OSError: it cannot be read.
    """
    return list(iter_events(path))
