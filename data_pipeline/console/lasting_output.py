"""Terminal output that outlasts its reader: for programs that must go on without being heard.

Python raises where output cannot be written: into a pipe whose reader is gone (`| tee log`), into a
file on a full disk (the output file of a batch job), into a full pipe that does not block.  It
raises again when it flushes at the end, and then changes the exit code.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import IO


class _LastingFile(io.FileIO):
    """A file descriptor whose failed writes are dropped; the next write is tried again."""

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        try:
            written = super().write(data)  # type: ignore[arg-type]
        except OSError:
            return size
        # None where a descriptor that does not block has no room; a buffer would raise
        return size if written is None else written


def make_output_lasting() -> None:
    """Let no failed write to stdout or stderr end this process, or change its exit code.

    A log line that cannot be written is dropped, too; by default Python prints a stack trace for
    each.
    """
    logging.raiseExceptions = False
    sys.stdout = _lasting(sys.stdout)
    sys.stderr = _lasting(sys.stderr)


def _lasting(stream: IO[str]) -> IO[str]:
    """Return a stream to the same file descriptor; the stream itself if it has none."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        descriptor = stream.fileno()
    except OSError:  # a stream in memory
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, "wb", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
