"""report.html drawn now and then while a run goes on, by a process of its own.

It has the lowest priority, and no step waits for it.  The first page that cannot be drawn costs a
warning, the others nothing.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from cpt.resilience.best_effort import best_effort
from cpt.telemetry.run_overview import one_line

LOWEST_PRIORITY = 19
KEPT_BYTES = 20_000
"""Of what a drawing that failed has said, so much of the end is logged."""

log = logging.getLogger("cpt.telemetry.report.periodic")


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
        self._errors: IO[bytes] | None = None
        self._has_warned = False

    def refresh(self) -> None:
        """Begin to draw, if it is time and no drawing is under way; return at once."""
        if not 0 < self._interval_seconds <= time.monotonic() - self._drawn_at:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._take_end()
        self._drawn_at = time.monotonic()
        with best_effort("report.html is not drawn"):
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # read when the process has ended
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cpt.cli", "report", "--run_dir", str(self._run_dir)],
                # it must not take memory of a GPU
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)

    def close(self) -> None:
        """End a drawing that is under way; the page that was there stays."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._take_end()

    def _take_end(self) -> None:
        """Tell of the first drawing that failed; its words go to the log file of this rank."""
        process, errors = self._process, self._errors
        self._process = self._errors = None
        if errors is None:
            return
        with best_effort("why report.html is not drawn is not known"), errors:
            if process is None or process.returncode == 0 or self._has_warned:
                return
            self._has_warned = True
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - KEPT_BYTES))
            said = errors.read().decode("utf-8", "replace").strip()
            log.warning(
                "report.html is not drawn: cpt report ended with %d%s. Training is not affected.",
                process.returncode,
                f" ({one_line(said.splitlines()[-1])})" if said else "",
            )
            log.debug("cpt report said:\n%s", said)
