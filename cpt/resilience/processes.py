"""Processes of this machine as the kernel describes them in /proc (proc(5)).

This module imports nothing heavy, so that `cpt.resilience.stop` can use it before torch is
imported. Every function takes a process that is gone as a normal case.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from data_pipeline.store.boot import this_boot

_STATE = 0
_PARENT = 1
_START_TICKS = 19
_EXIT_STATUS = 49
"""Positions in /proc/PID/stat, counted from the field after the command name."""


def process_ids() -> list[int]:
    """Return the ids of all processes that this process can see."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def parent_of(pid: int) -> int | None:
    """Return the id of the parent of a process, or None if the process is gone."""
    if pid == os.getpid():
        return os.getppid()
    fields = _stat_fields(pid)
    if not fields:
        return None
    return int(fields[_PARENT])


def start_ticks_of(pid: int) -> str:
    """Return when a living process was started, or an empty string if there is none.

    The unit is clock ticks since the boot of the machine. The pair of id and start names a process
    uniquely, because ids are used again.
    """
    fields = _stat_fields(pid)
    if not fields or fields[_STATE] == "Z":
        return ""
    return fields[_START_TICKS]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, whether or not its parent has waited for it."""
    return start_ticks_of(pid) == ""


def exit_status_of(pid: int) -> int | None:
    """Return the wait status of a process that has ended and that its parent has not waited for.

    None if it runs, or is gone altogether. The kernel says 0 to a process of another user.
    """
    fields = _stat_fields(pid)
    if len(fields) <= _EXIT_STATUS or fields[_STATE] != "Z":
        return None
    return int(fields[_EXIT_STATUS])


def is_own_process(pid: int, started: str) -> bool:
    """Return whether a process lives, was started at that time, and belongs to this user.

    Args:
        pid: Its id.
        started: Its start as `start_ticks_of` gave it.
    """
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return False
    return owner == os.geteuid() and started != "" and start_ticks_of(pid) == started


def send_signal(pid: int, started: str, number: signal.Signals) -> bool:
    """Send a signal to a process of this user that was started at a known time.

    Returns:
        Whether it was sent. It is not if the id belongs to another process by now.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, AttributeError):
        pidfd = -1  # the process is gone, the kernel is old, or Python was built for an old one
    try:
        # an open descriptor means the process that is looked at here, even if it ends meanwhile
        if not is_own_process(pid, started):
            return False
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, number)
        else:
            os.kill(pid, number)
        return True
    except OSError:
        return False
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def age_seconds() -> float:
    """Return the seconds since this process was started, its imports included."""
    started_seconds = int(start_ticks_of(os.getpid())) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_seconds


def command_of(pid: int) -> list[str]:
    """Return the words of a process's command line; an empty list if it is gone."""
    return _zero_separated(pid, "cmdline")


def environment_of(pid: int) -> list[str]:
    """Return a process's variables as NAME=VALUE; an empty list if it is gone or not ours."""
    return _zero_separated(pid, "environ")


def kernel_report_of(pid: int) -> list[str]:
    """Return what the kernel says about a process that may not be able to speak for itself."""
    lines = [f"pid {pid} as the kernel sees it:"]
    for name in ("status", "wchan", "syscall", "stack"):
        text = _read(Path(f"/proc/{pid}/{name}"))
        for line in text.splitlines():
            if name != "status" or line.startswith(("State", "Threads", "VmRSS")):
                lines.append(f"{name}: {line}")
    return lines


def pid_namespace() -> str:
    """Return the boot and the pid namespace in which process ids of this process mean something."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{this_boot()} {namespace}"


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command name, which may hold spaces itself."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if len(fields) <= _START_TICKS:
        return []
    return fields


def _zero_separated(pid: int, name: str) -> list[str]:
    text = _read(Path(f"/proc/{pid}/{name}"))
    if not text:
        return []
    return text.rstrip("\0").split("\0")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
