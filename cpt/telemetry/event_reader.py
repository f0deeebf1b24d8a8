"""metrics.jsonl read piece by piece while a run writes it, so that each line is read once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cpt.errors import DataError
from data_pipeline.bounded.files import MalformedInput, open_regular
from data_pipeline.bounded.json_text import parse_json

Event = dict[str, Any]

CHUNK_BYTES = 8 * 2**20
"""Most bytes that one look reads; a line that is longer is passed over."""
SHOWN_BYTES = 2**28
"""Most of a log that a page draws, because it keeps every event; long runs write more."""
MAX_LOG_BYTES = 2**33
"""Size of a log that is read as a whole: 100,000 steps with 50 sources and KL targets take 0.6 GB.
"""
MAX_LINE_BYTES = 2**20
"""Size of an event; that of a decision of the guard over many domains has some 100 kB."""
MAX_COLLECTIONS = 20_000
"""Lists and objects in an event: each takes some sixty bytes of memory and two of the file."""


class EventReader:
    """The lines of a metrics.jsonl that were added since the last look.

    A line counts when its line break is there, so one that is being written, or that a crash cut
    off, is left for the next look.  A file that was replaced or cut is read from its beginning.
    """

    def __init__(self, path: Path, *, tail_bytes: int | None = None) -> None:
        """Read nothing yet.

        Args:
            path: The file, which need not exist.
            tail_bytes: Begin so many bytes before the end, and not at the beginning.
        """
        self._path = path
        self._tail_bytes = tail_bytes
        self._identity: tuple[int, int] | None = None
        self._size = 0
        self._offset = 0
        self._begins_inside_a_line = False
        self.is_whole = True
        """Whether the file is read from its beginning."""
        self.is_caught_up = False
        """Whether the last look came to the end of the file."""
        self.num_damaged = 0
        """Lines that are no JSON object."""
        self.written: float | None = None
        """Unix time of the last change of the file; None if there is no file."""

    @property
    def share_read(self) -> float:
        """Share of the file that was read when it was last looked at, 0 to 1."""
        if self._size == 0:
            return float(self.is_caught_up)
        return self._offset / self._size

    def find_file(self) -> bool:
        """Look for the file; call it before `read`.

        Returns:
            False if it is not the one that was read so far, so that what was read is to be
            forgotten.
        """
        try:
            status = self._path.stat()
        except OSError:
            is_same = self._identity is None
            self._identity = None
            self._size = 0
            self._offset = 0
            self.written = None
            return is_same
        self._size = status.st_size
        self.written = status.st_mtime
        identity = (status.st_dev, status.st_ino)
        if identity == self._identity and status.st_size >= self._offset:
            return True
        self._identity = identity
        self._offset = 0
        if self._tail_bytes is not None:
            self._offset = max(0, self._size - self._tail_bytes)
        self.is_whole = self._offset == 0
        self._begins_inside_a_line = not self.is_whole
        self.num_damaged = 0
        return False

    def read(self, max_bytes: int = CHUNK_BYTES) -> list[dict[str, Any]]:
        """Return the next events, which are JSON objects; lines that are none are counted.

        Raises:
            OSError: the file cannot be read.
        """
        self.is_caught_up = True
        if self._offset >= self._size:
            return []
        with open_regular(self._path, follow_links=False) as file:
            file.seek(self._offset)
            data = file.read(max_bytes)
        self.is_caught_up = len(data) < max_bytes
        end = data.rfind(b"\n") + 1
        if end == 0:
            # a line without an end: one that is being written, or one that is too long to be ours
            self._offset += 0 if self.is_caught_up else len(data)
            return []
        self._offset += end
        lines = data[:end].split(b"\n")
        if self._begins_inside_a_line:
            lines = lines[1:]
            self._begins_inside_a_line = False
        return self._parsed(lines)

    def _parsed(self, lines: list[bytes]) -> list[dict[str, Any]]:
        events = []
        for line in lines:
            if not line.strip():
                continue
            event = _parsed_line(line)
            if isinstance(event, dict):
                events.append(event)
            else:
                self.num_damaged += 1
        return events


def _parsed_line(line: bytes) -> Any:
    """Return the JSON value of a line; None if it is none, or beyond a limit."""
    if len(line) > MAX_LINE_BYTES or line.count(b"[") + line.count(b"{") > MAX_COLLECTIONS:
        return None
    try:
        return parse_json(line, lone_surrogates=True)
    except MalformedInput:
        return None


def read_last_events(path: Path, tail_bytes: int) -> tuple[list[Event], bool]:
    """Read the events at the end of a metrics.jsonl; lines that are none are passed over.

    Args:
        path: The file.
        tail_bytes: How much of its end is read.

    Returns:
        The events, and whether the file was read from its beginning.

    Raises:
        OSError: it cannot be read.
    """
    reader = EventReader(path, tail_bytes=tail_bytes)
    path.stat()
    reader.find_file()
    events = list(_events_left(reader))
    return events, reader.is_whole


def iter_events(path: Path, kinds: Collection[str] | None = None) -> Iterator[Event]:
    """Yield the events of a metrics.jsonl; lines that are none are passed over.

    One piece of the file is in memory at a time, so a caller that keeps little needs little.

    Args:
        path: The file.
        kinds: Values of `event` that are wanted; None yields all.

    Raises:
        OSError: it cannot be read.
        DataError: it is larger than `MAX_LOG_BYTES`.
    """
    reader = EventReader(path)
    if path.stat().st_size > MAX_LOG_BYTES:
        raise DataError(f"{path}: larger than {MAX_LOG_BYTES:,} bytes, the most that is read.")
    reader.find_file()
    for event in _events_left(reader):
        kind = event.get("event")
        if kinds is None or (isinstance(kind, str) and kind in kinds):
            yield event


def _events_left(reader: EventReader) -> Iterator[Event]:
    yield from reader.read()
    while not reader.is_caught_up:
        yield from reader.read()
