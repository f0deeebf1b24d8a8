"""File descriptors: how many this process may have, and how many are left.

Decisions
    The soft limit is a default for programs that use select(), which this project does not: it is
    raised to what is needed, up to the hard limit, which only an administrator can raise.
"""

from __future__ import annotations

import os
import resource

from data_pipeline.errors import StorageError

_SPARE = 128
"""Descriptors left for everything else: libraries, pipes, logs, files that are being written."""


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files to the hard one, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft != resource.RLIM_INFINITY and soft < hard:
        _set_soft_limit(hard, hard)


def reserve_descriptors(count: int, place: str) -> None:
    """Make sure that `count` more files can be opened; raise the soft limit if they cannot.

    Args:
        count: Number of files.
        place: What they belong to, for the message.

    Raises:
        StorageError: The hard limit is too low.
    """
    needed = _num_open() + count + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    allowed = needed <= hard or hard == resource.RLIM_INFINITY
    if allowed and _set_soft_limit(needed, hard):
        return
    raise StorageError(
        f"{place}: needs {count:,} open files, but this process may have {hard:,} (hard limit on "
        f"open files; `ulimit -Hn` shows it) and {needed:,} are needed in all. Raise the limit, "
        "or join small input files to larger ones: each becomes a token shard."
    )


def num_spare_descriptors() -> int:
    """Return how many more files this process may open, without those left for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return soft - _num_open() - _SPARE


def _set_soft_limit(soft: int, hard: int) -> bool:
    """Set the soft limit; return whether the system let us."""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):
        return False
    return True


def _num_open() -> int:
    """Return the number of descriptors that are open, about."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder))
        except OSError:
            continue
    return 0
