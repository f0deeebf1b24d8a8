"""How many processes the kernel has killed for lack of memory: of this job, and of this machine.

Sources
    memory.events of the control group (cgroup v2, oom_kill), or memory.oom_control (v1, oom_kill),
    which both count processes below the group, too; /proc/vmstat (oom_kill, Linux 4.13).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_CURE = (
    "Give the job more memory, or let it need less: checkpoint.async_save=stream, fewer ranks a "
    "node, no offloading to host memory."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KillCounts:
    """Kills for lack of memory so far; None where the kernel does not say."""

    job: int | None
    """Of processes in the control group of this process."""
    machine: int | None
    """Of processes of this machine, other jobs' included."""

    def since(self, before: KillCounts) -> str:
        """Return what the counts say about the cause of a SIGKILL that has just happened."""
        if self.job is not None and before.job is not None and self.job > before.job:
            return (
                "The kernel's out-of-memory killer did it, because the job's memory was used up "
                f"(kills in its control group since the start: {self.job - before.job}). "
                f"{_CURE}"
            )
        if self.machine is None or before.machine is None:
            return f"The kernel's out-of-memory killer is the usual cause. {_CURE}"
        if self.machine > before.machine:
            return (
                "The kernel's out-of-memory killer is the likely cause (its kills on this machine "
                f"since the start: {self.machine - before.machine}). {_CURE}"
            )
        return (
            "The kernel counts no kill for lack of memory in this run, so the batch system (a "
            "limit on time or memory) or a person sent it."
        )


def kill_counts(root: Path = Path("/")) -> KillCounts:
    """Return the counts of this moment.

    Args:
        root: The folder below which `proc` and `sys` lie.
    """
    machine = _counter(root / "proc/vmstat")
    job = None
    for file in _files_of_job(root):
        job = _counter(file)
        if job is not None:
            break
    return KillCounts(job=job, machine=machine)


def _files_of_job(root: Path) -> list[Path]:
    """Return the files that may hold the count of this process's control group, nearest first."""
    files = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        below = group.lstrip("/")
        if controllers == "":
            files.append(root / "sys/fs/cgroup" / below / "memory.events")
            files.append(root / "sys/fs/cgroup/memory.events")  # in a container of its own
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / below / "memory.oom_control")
            files.append(root / "sys/fs/cgroup/memory/memory.oom_control")
    return files


def _counter(file: Path) -> int | None:
    """Return the value of `oom_kill` in a file of lines of a name and a number."""
    for line in _read(file).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "oom_kill" and words[1].isdigit():
            return int(words[1])
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
