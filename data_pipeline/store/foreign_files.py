"""Files that anybody may have put there, which may be anything: a pipe, a device, endless."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

SMALL_BYTES = 2**20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, and wait for nothing.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    # without O_NONBLOCK the opening of a pipe waits until somebody writes
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_small_file(path: Path, max_bytes: int = SMALL_BYTES) -> bytes:
    """Return the content of a regular file that should be small.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device.
        ValueError: it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return content
