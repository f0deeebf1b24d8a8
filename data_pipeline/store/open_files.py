"""Byte ranges of very many files, of which only the latest stay open.

Decisions
    Reading is `pread`, no memory map. A map keeps a descriptor, and a build may have more shards
    than a process may have open files. A page fault of a map holds Python's lock, so that a thread
    that reads ahead stops the one that trains; `pread` gives it up. And what cannot be read is an
    exception, where a map ends the process with SIGBUS.
    A descriptor is closed once nobody uses it: a thread that reads from a file keeps it open,
    whatever the others open meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from data_pipeline.bounded.files import open_regular
from data_pipeline.errors import DataError
from data_pipeline.store.descriptors import num_spare_descriptors

_FEWEST = 8
_MOST = 4096


class _OpenFile:
    """A descriptor that is closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self._file = open_regular(
            Path(path)
        ).detach()  # a buffer of a parallel file system is 4 MiB
        self.descriptor = self._file.fileno()

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()


class OpenFiles:
    """Reads ranges of files from any thread; the least recently used ones are closed."""

    def __init__(self, most: int | None = None) -> None:
        """Open nothing yet.

        Args:
            most: How many files stay open; None takes what the limit on open files leaves.
        """
        if most is None:
            most = min(max(num_spare_descriptors(), _FEWEST), _MOST)
        self._most = most
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def read(self, path: str, num_bytes: int, position: int) -> bytes:
        """Return `num_bytes` of a file from a position on.

        Raises:
            DataError: the file ends before that.
            OSError: it cannot be read.
        """
        file = self._file(path)
        content = os.pread(file.descriptor, num_bytes, position)
        if len(content) == num_bytes:
            return content
        parts = [content]
        missing = num_bytes - len(content)
        while parts[-1] and missing:  # one call returns 2 GiB at most
            parts.append(os.pread(file.descriptor, missing, position + num_bytes - missing))
            missing -= len(parts[-1])
        if missing:
            raise DataError(
                f"{path}: ends {missing} bytes before byte {position + num_bytes}. The file is "
                "damaged: delete the build and build it again."
            )
        return b"".join(parts)

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        # outside the lock: on a busy file system another thread need not wait for this one
        file = _OpenFile(path)
        with self._lock:
            self._open[path] = file
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return file
