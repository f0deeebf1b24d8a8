"""One job per run directory: <run_dir>/.lock says who is at work, and a thread keeps its time stamp
fresh.

Whether a holder is alive
    on this machine: its process exists and was started at the noted time;
    the same SLURM job, started again: the earlier start is over by definition;
    elsewhere: its time stamp, by the clock of the file system, is younger than `STALE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.errors import ConfigError
from data_pipeline.store.files import write_json

LOCK = ".lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0

log = logging.getLogger("cpt.lock")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process that works on a run directory."""

    host: str
    """Name of its machine."""
    pid: int
    """Process id of rank 0."""
    started: str
    """Start of the process in clock ticks since boot: ids are used again."""
    machine: str
    """Boot of the machine and pid namespace in which `pid` means something."""
    job: str
    """SLURM job id; empty outside SLURM."""
    restarts: int
    """How often SLURM has started this job again."""
    token: str
    """Unique."""


class RunLock:
    """A run directory that this process holds."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Let others have the directory."""
        self._released.set()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                holder = _read(self._path)
                if holder is not None and holder != self._holder:
                    log.error(
                        "%s was taken over by %s; two jobs must not write here.",
                        self._path,
                        describe(holder),
                    )
                    os._exit(ConfigError.exit_code)
                os.utime(self._path)
            except OSError as error:
                log.warning("%s cannot be refreshed: %s", self._path, error.strerror)


def take_lock(run_dir: Path) -> RunLock:
    """Hold a run directory, or say who does.

    Raises:
        ConfigError: another job is at work there.
    """
    path, own = run_dir / LOCK, this_process()
    with _one_at_a_time(run_dir):
        if path.exists():
            holder = _read(path)
            if why := why_alive(holder, own, path):
                raise ConfigError(
                    f"{run_dir} is in use by {describe(holder)}: {why}. Wait for it, stop it, or give another "
                    f"--run_dir. If you are sure that it is gone, remove {path}."
                )
            log.info("%s was left by %s; taken over", path, describe(holder))
        write_json(path, asdict(own))
    return RunLock(path, own)


@contextlib.contextmanager
def _one_at_a_time(run_dir: Path):  # type: ignore[no-untyped-def]
    """Two that find the same stale lock do not both take it; where the file system has no flock,
    the odds must do.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None if the file says nothing sensible."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def why_alive(holder: Holder | None, own: Holder, path: Path) -> str:
    """What speaks for it that a holder is at work; empty if it is gone."""
    if holder is not None and holder.machine == own.machine:
        return "the process is running" if _start_of(holder.pid) == holder.started else ""
    if (
        holder is not None
        and holder.job
        and holder.job == own.job
        and holder.restarts < own.restarts
    ):
        return ""
    age = _age_seconds(path)
    if age >= STALE_SECONDS:
        return ""
    return f"its last sign of life is {age:.0f} s old (it counts as gone after {STALE_SECONDS:.0f})"


def _age_seconds(path: Path) -> float:
    """By the clock of the file system, which may not be this machine's."""
    probe = path.with_name(f"{LOCK}-probe-{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def describe(holder: Holder | None) -> str:
    """A holder for people."""
    if holder is None:
        return "an unknown job"
    return f"process {holder.pid} on {holder.host}" + (
        f" (SLURM job {holder.job})" if holder.job else ""
    )


def this_process() -> Holder:
    """This process as a holder."""
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_start_of(os.getpid()),
        machine=f"{_read_text('/proc/sys/kernel/random/boot_id')} {_namespace()}",
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        token=uuid.uuid4().hex,
    )


def _start_of(pid: int) -> str:
    """Start time of a living process; empty if there is none."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
