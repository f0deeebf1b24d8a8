"""Lines of the watchdog for people, on standard error, which may be a pipe that nobody reads."""

from __future__ import annotations

import os
import threading

from cpt.resilience.time_limit import at_most
from data_pipeline.escaping import escaped_line

SAY_SECONDS = 2.0
"""How long a line may take to be written. Whoever says one may be about to end the process."""


class Voice:
    """Says lines without logging, whose lock a hung thread may hold; any thread may call it."""

    def __init__(self) -> None:
        self._writing = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line, escaped.

        A line that cannot be written in time is dropped, and so are those after it while it waits:
        the watchdog watches without being heard.
        """

        def write() -> None:
            if not self._writing.acquire(timeout=SAY_SECONDS):
                return
            try:
                os.write(2, f"watchdog: {escaped_line(text)}\n".encode())
            finally:
                self._writing.release()

        at_most(SAY_SECONDS, write, "watchdog voice")
