"""The ranks of this node as processes: one that ends is noticed at once, with what ended it.

A process that is killed cannot say so. Its peers only see closed connections, and the launcher's
own code names no rank.

Decisions
    A pidfd becomes readable when its process ends, whoever its parent is (pidfd_open(2), Linux
    5.3). The launcher waits for its ranks once a second. Until then /proc/PID/stat holds the wait
    status (proc(5), exit_code), from which the signal is read.
    On an older kernel /proc is asked ten times a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass

from cpt.resilience.processes import exit_status_of, is_gone

POLL_SECONDS = 0.1
"""Time between two looks at a process without a pidfd."""
_CURES = {
    signal.SIGBUS: "A page of a mapped file could not be read or written: look for a full /dev/shm "
    "or disk, and for files that were cut while in use.",
    signal.SIGSEGV: "A native library crashed; the lines above may name it.",
    signal.SIGABRT: "A native library gave up; the lines above may say why.",
    signal.SIGILL: "A native library has instructions that this processor lacks.",
    signal.SIGFPE: "A native library crashed; the lines above may name it.",
}
"""Explanation of the signals that a process seldom gets from outside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """The end of another rank's process."""

    rank: int
    pid: int
    signal: int
    """The signal that ended it; 0 if none did."""
    code: int | None
    """Its exit code; None if a signal ended it, or if it is not known."""


class Neighbors:
    """The processes of the other ranks of this node."""

    def __init__(self) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._pids: dict[int, int] = {}
        self._pidfds: dict[int, int] = {}

    @property
    def ranks(self) -> list[int]:
        """The ranks whose processes have not been found ended."""
        return sorted(self._pids)

    def meet(self, rank: int, pid: int) -> None:
        """Watch the process of a rank, which must be of this machine and pid namespace."""
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            # an old kernel, a Python built for one, or the process is gone: `wait` looks into /proc
            self._pids[rank] = pid
        else:
            self._pidfds[rank] = pidfd
            self._poll.register(pidfd, select.POLLIN)
            self._pids[rank] = pid
        self.wake()

    def wake(self) -> None:
        """Let `wait` look again and return."""
        os.eventfd_write(self._wake, 1)

    def wait(self) -> list[Death]:
        """Wait until a process has ended or `wake` is called; return those found, each one once."""
        has_pidfds = len(self._pidfds) == len(self._pids)
        self._poll.poll(None if has_pidfds else 1000 * POLL_SECONDS)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        return [self._take(rank) for rank, pid in self._pids.copy().items() if is_gone(pid)]

    def _take(self, rank: int) -> Death:
        pid = self._pids.pop(rank)
        status = exit_status_of(pid)
        pidfd = self._pidfds.pop(rank, None)
        if pidfd is not None:
            self._poll.unregister(pidfd)
            os.close(pidfd)
        if status is None:
            return Death(rank=rank, pid=pid, signal=0, code=None)
        if os.WIFSIGNALED(status):
            return Death(rank=rank, pid=pid, signal=os.WTERMSIG(status), code=None)
        return Death(rank=rank, pid=pid, signal=0, code=os.WEXITSTATUS(status))

    def close(self) -> None:
        """Close all descriptors; nothing may be called afterwards."""
        for descriptor in [self._wake, *self._pidfds.values()]:
            os.close(descriptor)


def describe_kill(death: Death, *, node: str, step: int, cause: str) -> str:
    """Return what killed a rank, and the likely cause, in one line.

    Args:
        death: A death by a signal.
        node: The node that it happened on.
        step: The optimizer step in progress; 0 before the first.
        cause: What the kernel's counts say about a SIGKILL; see `KillCounts.since`.
    """
    name = f"signal {death.signal}"
    cure = cause if death.signal == signal.SIGKILL else ""
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        known = signal.Signals(death.signal)
        name = f"signal {death.signal} ({known.name})"
        cure = cure or _CURES.get(known, "")
    when = f"in step {step}" if step else "before the first step"
    text = f"rank {death.rank} (process {death.pid} on {node}) was killed by {name} {when}. {cure}"
    return text.rstrip()
