"""File descriptors: how many this process may have, and how many are left.

Decisions
    The soft limit is a default for programs that use select(), which this project does not: it is
    raised to what is needed, up to the hard limit, which only an administrator can raise.
"""

from __future__ import annotations

import os
import resource

_SPARE = 128
"""Descriptors left for everything else: libraries, pipes, logs, files that are being written."""


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files to the hard one, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft != resource.RLIM_INFINITY and soft < hard:
        _set_soft_limit(hard, hard)


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
