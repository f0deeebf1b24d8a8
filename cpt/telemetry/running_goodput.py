"""The productive share of a run's time while it goes on, from the metrics.jsonl that it writes."""

from __future__ import annotations

import math
import time
from pathlib import Path

from cpt.telemetry.event_reader import EventReader
from cpt.telemetry.goodput import GoodputAccount


class RunningGoodput:
    """The account of a run up to now; every line of the file is read once."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._reader = EventReader(path)
        self._account = GoodputAccount()

    def share(self) -> float:
        """Return the productive share of all starts so far, 0 to 1; NaN if it cannot be told."""
        try:
            if not self._reader.find_file():
                self._account = GoodputAccount()
            self._read_on()
        except OSError:
            return math.nan
        return self._account.share_at(time.time())

    def _read_on(self) -> None:
        while True:
            for event in self._reader.read():
                self._account.take(event)
            if self._reader.is_caught_up:
                return
