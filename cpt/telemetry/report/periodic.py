"""report.html drawn now and then while a run goes on, by a process of its own.

It has the lowest priority, and no step waits for it.  A page that cannot be drawn costs a warning.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cpt.resilience.best_effort import best_effort

LOWEST_PRIORITY = 19


class PeriodicReport:
    """Draws the page of one run."""

    def __init__(self, run_dir: Path, interval_seconds: float) -> None:
        """Draw nothing yet.

        Args:
            run_dir: The run directory.
            interval_seconds: Least time between two pages; 0 draws none.
        """
        self._run_dir = run_dir
        self._interval_seconds = interval_seconds
        self._drawn_at = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None

    def refresh(self) -> None:
        """Begin to draw, if it is time and no drawing is under way; return at once."""
        if not 0 < self._interval_seconds <= time.monotonic() - self._drawn_at:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._drawn_at = time.monotonic()
        with best_effort("report.html is not drawn"):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cpt.cli", "report", "--run_dir", str(self._run_dir)],
                # it must not take memory of a GPU
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)

    def close(self) -> None:
        """End a drawing that is under way; the page that was there stays."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None
