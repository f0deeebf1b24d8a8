"""The productive share of a run's time while it goes on, from the metrics.jsonl that it writes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path

from cpt.telemetry.event_reader import Event, EventReader
from cpt.telemetry.goodput import Goodput, GoodputAccount

LOOK_SECONDS = 1.0
"""Longest time that one look at the share reads, since training waits for it: the log of a run of
100,000 steps that goes on is read in a minute, over many looks.
"""


class RunningGoodput:
    """The account of a run up to now; every line of the file is read once."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path
        self._reader = EventReader(path)
        self._account = GoodputAccount()

    def share(self) -> float:
        """Return the productive share of all starts so far, 0 to 1; NaN if it cannot be told, or
        not yet.
        """
        try:
            if not self._read_on(LOOK_SECONDS):
                return math.nan
        except OSError:
            return math.nan
        return self._account.share_at(time.time())

    def result(
        self, waiting: Sequence[Event] = (), longest_seconds: float = math.inf
    ) -> Goodput | None:
        """Return the account of all starts.

        Args:
            waiting: Events that follow those of the file.
            longest_seconds: Longest time to read what was not read yet.

        Returns:
            None if that is too short.

        Raises:
            OSError: the file cannot be read.
        """
        self._path.stat()
        if not self._read_on(longest_seconds):
            return None
        account = self._account
        if waiting:
            account = copy.deepcopy(account)  # these come again once they are in the file
        for event in waiting:
            account.take(event)
        return account.result()

    def _read_on(self, longest_seconds: float) -> bool:
        """Read for a time, or to the end; return whether the end was reached."""
        if not self._reader.find_file():
            self._account = GoodputAccount()
        until = time.monotonic() + longest_seconds
        while True:
            for event in self._reader.read():
                self._account.take(event)
            if self._reader.is_caught_up:
                return True
            if time.monotonic() >= until:
                return False
