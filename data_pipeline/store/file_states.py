"""The state of a file: whether it is still the one that was seen before, without reading it.

Decisions
    Anybody can set the time of modification, but nobody the time of the last change of the inode
    (ctime), so a file that was rewritten and dated back is noticed.
    A file that was changed in the last tick of its file system's clock could be changed once more
    without another time.  So the content of such a file is read only after the tick is over.
    The state of an object of S3 has a number made of its ETag in place of the inode, so content
    that was written within the same second is another state.
    The device is no part of a state: nodes of a cluster number a shared file system differently.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.objects.object_paths import ObjectPath

_TICK_SECONDS = 0.02
"""Longer than a tick of the clocks of file systems that keep fractions of a second."""
_COARSE_TICK_SECONDS = 1.1
"""The same for file systems that keep whole seconds, such as Lustre."""
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class FileState:
    """What the file system says of a file; equal states mean that nobody wrote in between."""

    size_bytes: int
    mtime_ns: int
    """Time of the last modification."""
    ctime_ns: int
    """Time of the last change of content, name, mode or number of links."""
    inode: int

    def has_size_and_mtime_of(self, other: FileState) -> bool:
        """Return whether size and time of modification are equal, so content probably is."""
        return (self.size_bytes, self.mtime_ns) == (other.size_bytes, other.mtime_ns)


def state_of(path: Path) -> FileState:
    """Return the state that a file, or the file that a link leads to, or an object has now.

    Raises:
        OSError: it is not there, or cannot be looked at.
        StorageError: the store of the object does not answer.
    """
    return _state(path.current_status() if isinstance(path, ObjectPath) else os.stat(path))


def listed_state_of(path: Path) -> FileState:
    """Return the state of a file, or that which an object had when it was listed.

    Raises:
        OSError: it is not there, or cannot be looked at.
    """
    return _state(path.stat())


def _state(status: os.stat_result) -> FileState:
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def settled_state_of(path: Path) -> FileState:
    """Return the state of a file once a later write would give it another one.

    This waits only for a file that was written in the last moment.

    Raises:
        OSError: it is not there, or cannot be looked at.
    """
    state = state_of(path)
    if isinstance(path, ObjectPath):
        return state
    tick_seconds = _TICK_SECONDS
    if state.ctime_ns % _SECOND_NS == 0:
        tick_seconds = _COARSE_TICK_SECONDS
    age_seconds = (time.time_ns() - state.ctime_ns) / _SECOND_NS
    # the clock of a file server may be ahead of this one: nobody waits longer than a tick
    if age_seconds < tick_seconds:
        time.sleep(min(tick_seconds - age_seconds, tick_seconds))
        return state_of(path)
    return state
