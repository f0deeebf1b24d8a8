"""Requests to stop: signals set a flag, rank 0 looks for <run_dir>/STOP; acting on them is a collective decision."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this rank has been asked to stop."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = run_dir / "STOP" if rank == 0 else None
        self._signalled = False

    def listen(self) -> None:
        """Take over the stop signals; the handler does nothing but note them."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Whether a signal came or the file is there."""
        return self._signalled or (self._file is not None and self._file.exists())

    def consume(self) -> None:
        """Remove the file that this run has obeyed."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
