"""Locks on files, which the kernel drops when their process dies, however it dies.

Decisions
    Whoever can open a file, if only for reading, can hold its lock for ever.  So a lock is a file
    of its own with mode 0600, never a directory that others may read.
    Nobody waits without end and without a word: after `TELL_SECONDS` a waiting process names who
    holds the lock, if that can be known, and after its own limit it gives up.
    /proc/locks knows the holder if it is a process of this machine; those of others are not known.
    Where the file system has no flock, nothing keeps two processes apart, and callers are told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.store.files import no_links
from data_pipeline.store.ownership import user_name

PRIVATE_MODE = 0o600
TELL_SECONDS = 2.0
_RETRY_SECONDS = 0.1
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems that have no flock, such as Lustre without its mount option."""
LOCK_LIST = Path("/proc/locks")

log = logging.getLogger(__name__)


class LockHeld(Exception):
    """A lock that another process still holds at the end of the time that was given."""


@contextlib.contextmanager
def file_lock(
    path: Path, *, is_shared: bool = False, limit_seconds: float = 0.0, is_kept: bool = True
) -> Iterator[bool]:
    """Hold the lock of a file, which is made if it is not there.

    Yields whether others are kept out: not where the file system has no flock.

    Args:
        path: The file; its content is never changed here.
        is_shared: Hold it together with others that do so.
        limit_seconds: How long to wait for others.
        is_kept: False removes the file at the end, unless others hold the lock as well.

    Raises:
        LockHeld: another process still holds it; the message names it, if it is known.
        ConfigError: the file belongs to another user.
        OSError: it cannot be made, or is a link or something else than a file.
    """
    descriptor, is_locked = _locked_descriptor(path, is_shared, limit_seconds)
    try:
        yield is_locked
    finally:
        if not is_kept:
            _remove(path, descriptor, is_locked)
        os.close(descriptor)


def _remove(path: Path, descriptor: int, is_locked: bool) -> None:
    """Remove a lock file that this process holds, unless others hold it together with it."""
    with contextlib.suppress(OSError):
        if is_locked:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(path, descriptor):
            path.unlink()


def _locked_descriptor(path: Path, is_shared: bool, limit_seconds: float) -> tuple[int, bool]:
    """Open and lock the file that has the name now; another process may have removed it."""
    deadline = time.monotonic() + limit_seconds
    while True:
        descriptor = _open_private(path)
        try:
            is_locked = _wait_for(descriptor, path, is_shared, deadline)
            if _is_still(path, descriptor):
                return descriptor, is_locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open_private(path: Path) -> int:
    """Open a lock file of this user that nobody else can open.

    Raises:
        ConfigError: it belongs to another user.
        OSError: it cannot be opened, or is a link.
    """
    owner = os.geteuid()
    with contextlib.suppress(FileNotFoundError):
        owner = path.lstat().st_uid
    _refuse_owner(path, owner)  # it may be one that cannot be opened
    try:
        descriptor = no_links(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, PRIVATE_MODE)
    except PermissionError:
        if owner != os.geteuid():
            raise _foreign(path, owner) from None
        raise
    try:
        status = os.fstat(descriptor)
        _refuse_owner(path, status.st_uid)  # it may be another one than a moment ago
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if stat.S_IMODE(status.st_mode) & 0o077 and status.st_uid == os.geteuid():
            os.fchmod(descriptor, PRIVATE_MODE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_owner(path: Path, owner: int) -> None:
    if owner not in (os.geteuid(), 0):
        raise _foreign(path, owner)


def _foreign(path: Path, owner: int) -> ConfigError:
    return ConfigError(
        f"the lock {path} belongs to {user_name(owner)}, not to {user_name(os.geteuid())}. Wait "
        "until that user is done. If nothing of that user is at work there any more, have the file "
        "removed; or choose another place."
    )


def _wait_for(descriptor: int, path: Path, is_shared: bool, deadline: float) -> bool:
    """Lock an open file; return whether that is possible.

    Raises:
        LockHeld: another process holds it at the deadline.
    """
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    tell_at = time.monotonic() + TELL_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error
        if now >= deadline:
            raise LockHeld(f"the lock {path} is held by {_holder_of(descriptor)}")
        if now >= tell_at:
            tell_at = deadline
            log.warning(
                "waiting for the lock %s, held by %s, for at most %.0f s more",
                path,
                _holder_of(descriptor),
                deadline - now,
            )
        time.sleep(_RETRY_SECONDS)


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether a name is still that of an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder_of(descriptor: int) -> str:
    """Return who holds the lock of an open file, for people."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = LOCK_LIST.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split()
        # 1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF; one that waits has -> behind its number
        if len(words) >= 6 and words[1] == "FLOCK" and words[5] == device:
            return _process_text(words[4])
    return "a process that cannot be named, perhaps on another machine"


def _process_text(pid: str) -> str:
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return f"process {pid} of this machine"
    return f"process {pid} of {user_name(owner)} on this machine"
