"""Requests to stop, as one rank notes them.

A request comes from a signal, the file <run_dir>/STOP, the end of the SLURM job, or the loss of the
launcher. Acting on it is a collective decision (`cpt.resilience.agreed_stop`).

This module imports nothing heavy, so that signals are noted while torch and DeepSpeed are still
being imported. The handler of a signal does nothing but note it. A rank whose launcher is gone has
no parent that waits for it: it asks for a stop as for any other reason, and leaves by force when
its time is up.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cpt.errors import StorageError
from cpt.resilience.best_effort import best_effort
from cpt.resilience.environment import job_end
from cpt.resilience.processes import command_of, parent_of

SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""Signals by which people, terminals and batch systems ask for a stop.

A terminal that is closed sends SIGHUP.  Grid Engine sends SIGUSR2 before it kills.  SIGXCPU tells
that the soft limit on processor time is used up.
"""
LAUNCHERS = (
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torchrun",
    "torch.distributed.run",
)
POLL_SECONDS = 1.0
LEAVE_BEFORE_END_SECONDS = 15
"""How long before SLURM would kill a process the process leaves by itself."""


class StopRequest:
    """The requests to stop that have reached this rank."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._reason = ""
        self._file: Path | None = None
        self._stop_at: float | None = None
        self._job_end = job_end(environment)

    def listen(self) -> None:
        """Note the stop signals of this process instead of ending it.

        A SIGHUP that is ignored stays ignored: `nohup` asks to go on without the terminal. Signals
        that came while this program took the place of another one were held back, and arrive now
        (cpt.job.stage_switch).
        """
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note stop signals while the block runs; afterwards they do what they did before."""
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                if handler is not None:  # one that Python did not install cannot be put back
                    signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note(signal.Signals(number).name)

    def note(self, reason: str) -> None:
        """Ask for a stop; only the first reason is kept."""
        self._reason = self._reason or reason

    def watch_run(self, run_dir: Path, margin_seconds: float) -> None:
        """Also look for the STOP file and at the clock; rank 0 does this for all ranks."""
        self._file = run_dir / "STOP"
        if self._job_end is not None:
            left = self._job_end - time.time()
            self._stop_at = self._job_end - min(margin_seconds, left / 4)

    def requested(self) -> bool:
        """Return whether this rank wants to stop."""
        return bool(self.reason())

    def reason(self) -> str:
        """Return why this rank wants to stop, or an empty string if it does not."""
        # os.path: a file system that does not answer is no request, and no error either
        if not self._reason and self._file is not None and os.path.exists(self._file):
            self.note("STOP file")
        if not self._reason and self._stop_at is not None and time.time() >= self._stop_at:
            self.note(f"the job ends in {self._job_end_in():.0f} s")
        return self._reason

    def consume(self) -> None:
        """Remove the STOP file, which this run has obeyed."""
        if self._file is not None:
            with best_effort("The STOP file stays, and the next start will obey it again"):
                self._file.unlink(missing_ok=True)

    def _job_end_in(self) -> float:
        assert self._job_end is not None
        return self._job_end - time.time()

    def seconds_to_leave(self, budget_seconds: float) -> float:
        """Return how long leaving may take: the budget, or less if the job ends before."""
        if self._job_end is None:
            return budget_seconds
        return max(1.0, min(budget_seconds, self._job_end_in() - LEAVE_BEFORE_END_SECONDS))


class Deadline:
    """A timer that ends the process with the code of a storage failure unless it is canceled."""

    def __init__(self, seconds: float, what: str) -> None:
        self._text = (
            f"\n{what} took longer than {seconds:.0f} s; leaving now. "
            "Complete checkpoints are intact.\n"
        )
        self._ends_at = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Call the end off: the work was done in time."""
        self._timer.cancel()

    def seconds_left(self) -> float:
        """Return how long it is until the end, whether that was called off or not."""
        return max(0.0, self._ends_at - time.monotonic())

    def _expire(self) -> None:
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, self._text.encode())
        os._exit(StorageError.exit_code)


def watch_launcher(stop: StopRequest, budget_seconds: float) -> None:
    """Take the loss of a launcher process above this one as a request to stop from now on.

    The launcher forwards no signal, and its ranks outlive it: a `deepspeed` that is killed leaves
    orphans.
    """
    links = launcher_links()
    if not links:
        return

    def watch() -> None:
        while all(parent_of(child) == parent for child, parent in links):
            time.sleep(POLL_SECONDS)
        stop.note("the launcher is gone")
        Deadline(budget_seconds, "leaving after the launcher was gone")

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()


def launcher_links() -> list[tuple[int, int]]:
    """Return (child, parent) from this process upwards, as far as the parents are launchers."""
    links = []
    child = os.getpid()
    while (parent := parent_of(child)) is not None and _is_launcher(parent):
        links.append((child, parent))
        child = parent
    return links


def _is_launcher(pid: int) -> bool:
    # Only the first words count: python [-u] [-m] NAME. A script of the user that merely has a
    # launcher's name among its arguments is no launcher.
    names = {word.rpartition("/")[2] for word in command_of(pid)[:4]}
    return not names.isdisjoint(LAUNCHERS)
