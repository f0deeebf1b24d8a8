"""Files that anybody may have put there, which may be anything: a pipe, a device, endless."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from data_pipeline.objects.object_paths import ObjectPath

SMALL_BYTES = 2**20
LINK_REASON = "It is a symbolic link, which is not followed here"
"""Why a file is not opened where links could have been put by others."""


class MalformedInput(ValueError):
    """Content that is not of its format, or beyond a limit; the message does not name the file."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        """Make the error.

        Args:
            problem: What is wrong, without a full stop.
            line: Where it is, from 1; None if it concerns the whole file, or if nobody knows.
        """
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self._problem = problem
        self._line = line

    def of(self, source: object) -> str:
        """Return `FILE:LINE: PROBLEM.` for the file that the content is from."""
        line = "" if self._line is None else f":{self._line}"
        return f"{source}{line}: {self._problem}."


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a regular file or an object for reading, and wait for nothing that is no file.

    Args:
        path: The file.
        follow_links: False inside a run directory: a link there could lead to another file.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device, or a link.
    """
    if isinstance(path, ObjectPath):
        return path.open("rb")
    # without O_NONBLOCK the opening of a pipe waits until somebody writes
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not follow_links:
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if follow_links or error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        raise OSError(errno.ELOOP, LINK_REASON, str(path)) from error
    except ValueError as error:  # a NUL, or a character that a file name cannot have
        raise OSError(errno.EINVAL, f"Not a file name ({error})", str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_small_file(
    path: Path, max_bytes: int = SMALL_BYTES, *, follow_links: bool = True
) -> bytes:
    """Return the content of a regular file that should be small.

    Args:
        path: The file.
        max_bytes: The largest size that is read.
        follow_links: See `open_regular`.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device, or a link.
        MalformedInput: it is larger than `max_bytes`.
    """
    with open_regular(path, follow_links=follow_links) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise MalformedInput(f"larger than {max_bytes:,} bytes")
    return content


def read_small_text(path: Path, max_bytes: int = SMALL_BYTES) -> str:
    """Return the content of a regular file that should be a small text in UTF-8.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device.
        MalformedInput: it is larger than `max_bytes`, or not UTF-8.
    """
    return decoded(read_small_file(path, max_bytes))


def decoded(content: bytes) -> str:
    """Return bytes as a text in UTF-8, without the mark that some editors begin it with.

    Raises:
        MalformedInput: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"not UTF-8 at byte {error.start}. Save the file as UTF-8"
        raise MalformedInput(problem, line) from None
