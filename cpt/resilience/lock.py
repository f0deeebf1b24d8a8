"""The lock that keeps a run directory to one job: <run_dir>/.lock names the process at work, and a
thread keeps its time stamp fresh.

Two starts that find the same stale lock are kept apart by a lock of the kernel on another file,
which is there for that moment only.  Each user has one of his own: in a directory that is shared on
purpose, nobody else could open it.

How a start decides whether the holder is alive
    on this machine: its process exists and was started at the recorded time;
    an earlier start of the same job: it is over by definition;
    the program that this one has replaced in its process: it handed the lock over;
    elsewhere: its time stamp is younger than `STALE_SECONDS` by the clock of the file system.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.errors import ConfigError
from cpt.resilience.environment import job_id, restarts_of_job
from cpt.resilience.processes import pid_namespace, start_ticks_of
from data_pipeline.bounded.json_text import read_json
from data_pipeline.store.entry_types import check_types
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.files import FILE_MODE, write_json

LOCK = ".lock"
ENTRANCE = ".lock-entrance"
"""Prefix of the file that is locked while the lock is taken."""
ENTRANCE_SECONDS = 60.0
"""How long a start waits for another one that is taking the lock, which takes milliseconds."""
LOCK_TOKEN = "CPT_LOCK_TOKEN"
"""Variable in which a program tells the one that takes its place in the process that it held the
lock."""
REFRESH_SECONDS = 15.0
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
    """Start of the process in clock ticks since boot, because process ids are used again."""
    machine: str
    """Boot of the machine and pid namespace in which `pid` means something."""
    job: str
    """Id of the job, under PBS and AGE of its first start; empty outside of a job."""
    restarts: int
    """How often this job was started again."""
    token: str
    """A value that no other holder has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockSight:
    """A lock as a reader sees it, who takes nothing and writes nothing."""

    holder: Holder | None
    """Who holds it; None if the file cannot be understood."""
    is_held: bool
    """Whether the holder looks alive."""
    refreshed: float
    """Unix time of its last sign of life, by the clock of the file system."""


class RunLock:
    """A run directory that this process holds."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self._holder = holder
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Let others have the directory."""
        self._released.set()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()

    def hand_over(self) -> None:
        """Keep the directory for the program that is about to take the place of this one."""
        self._released.set()
        os.environ[LOCK_TOKEN] = self._holder.token
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def _keep_fresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
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


def take_lock(run_dir: Path, option: str = "--run_dir") -> RunLock:
    """Take a run directory for this process.

    Args:
        run_dir: The run directory, or another that one job at a time may write to.
        option: The option of the command line that names another.

    Raises:
        ConfigError: another job is at work there; the message names it.
    """
    path = run_dir / LOCK
    own = this_process()
    handed_over = os.environ.pop(LOCK_TOKEN, "")
    with _one_at_a_time(run_dir):
        if path.exists():
            holder = _read(path)
            is_own = holder is not None and holder.token == handed_over
            why = "" if is_own else why_alive(holder, own, path)
            if why:
                raise ConfigError(
                    f"{run_dir} is in use by {describe(holder)}: {why}. Wait for it, stop it, or "
                    f"give another {option}. If you are sure that it is gone, remove {path}."
                )
            if not is_own:
                log.info("%s was left by %s; taken over", path, describe(holder))
        write_json(path, asdict(own))
    return RunLock(path, own)


@contextlib.contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Keep two processes that find the same stale lock from both taking it.

    Raises:
        ConfigError: another process did not let go in time, or the file is another user's.
    """
    path = run_dir / f"{ENTRANCE}-{os.geteuid()}"
    try:
        with file_lock(path, limit_seconds=ENTRANCE_SECONDS, is_kept=False):
            yield
    except LockHeld as held:
        raise ConfigError(
            f"{run_dir}: {held}, for {ENTRANCE_SECONDS:.0f} s. A start holds it for a moment only: "
            "see what that process does, and end it if it hangs."
        ) from None


def _read(path: Path) -> Holder | None:
    """Return who holds a lock, or None if the file cannot be understood."""
    try:
        holder = Holder(**read_json(path, follow_links=False))
        check_types(holder, LOCK)
    except (ValueError, TypeError):
        return None
    return holder


def why_alive(holder: Holder | None, own: Holder, path: Path) -> str:
    """Return why the holder looks alive, or an empty string if it is gone."""
    if holder is not None and holder.machine == own.machine:
        if start_ticks_of(holder.pid) == holder.started:
            return "the process is running"
        return ""
    if holder is not None and _is_earlier_start(holder, own):
        return ""
    age = _age_seconds(path)
    if age >= STALE_SECONDS:
        return ""
    return f"its last sign of life is {age:.0f} s old (it counts as gone after {STALE_SECONDS:.0f})"


def look_at_lock(run_dir: Path) -> LockSight | None:
    """Return who holds a run directory, or None if nobody has left a lock.

    Nothing is written, so the age of a lock of another machine is judged by this machine's clock.
    """
    path = run_dir / LOCK
    try:
        refreshed = path.stat().st_mtime
        holder = _read(path)
    except OSError:
        return None
    if holder is not None and holder.machine == pid_namespace():
        is_held = start_ticks_of(holder.pid) == holder.started
    else:
        is_held = time.time() - refreshed < STALE_SECONDS
    return LockSight(holder=holder, is_held=is_held, refreshed=refreshed)


def _is_earlier_start(holder: Holder, own: Holder) -> bool:
    """Return whether the holder is an earlier start of this process's job."""
    same_job = holder.job != "" and holder.job == own.job
    return same_job and holder.restarts < own.restarts


def _age_seconds(path: Path) -> float:
    """Return the age of a file by the clock of the file system, which may not be this machine's."""
    probe = path.with_name(f"{LOCK}-probe-{uuid.uuid4().hex}")
    probe.touch(mode=FILE_MODE, exist_ok=False)
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def describe(holder: Holder | None) -> str:
    """Return a description of a holder for people."""
    if holder is None:
        return "an unknown job"
    text = f"process {holder.pid} on {holder.host}"
    if holder.job:
        text += f" (job {holder.job})"
    return text


def this_process() -> Holder:
    """Return this process as a holder."""
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=start_ticks_of(os.getpid()),
        machine=pid_namespace(),
        job=job_id(),
        restarts=restarts_of_job(),
        token=uuid.uuid4().hex,
    )
