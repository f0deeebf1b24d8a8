"""Trackers in threads of their own, so that one that raises or blocks leaves training alone.

    main thread: log -> bounded queue -> thread: open, log, close -> the service

Decisions
    `log` never waits: an event that finds the queue full is dropped and counted.
    A tracker that fails is opened again, with a warning, because its helper process may have been
    killed: by lack of memory, or by the signal that asks the whole job to stop.  An event at which
    it fails twice is left out.  A tracker that fails too often, or twice while it is opened, is
    left out for good.  The events are in metrics.jsonl.
    `close` waits for a limited time, then cuts the tracker off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from cpt.resilience.best_effort import reason_of

log = logging.getLogger("cpt.telemetry.trackers")

QUEUE_EVENTS = 4096
"""Events that may wait for a tracker."""
CLOSE_SECONDS = 40.0
"""Longest wait for a tracker at the end of a run."""
MOST_REOPENINGS = 3
"""How often a tracker that failed is opened again."""
CUT_OFF_SECONDS = 5.0
"""Longest wait for a tracker that was cut off."""


class Tracker(Protocol):
    """A service that shows events to people."""

    def log(self, event: dict[str, Any]) -> None:
        """Show one event."""

    def close(self) -> None:
        """Send what is left and close the connection."""


class BackgroundTracker:
    """A tracker that can neither raise nor block."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        *,
        cut_off: Callable[[], None] | None = None,
        queue_events: int = QUEUE_EVENTS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """Start a thread that opens the tracker.

        Args:
            name: What people call it.
            open_tracker: Opens it, which may take its time, too.
            cut_off: Ends what the tracker waits for, from another thread, and what it would do when
                Python exits; also called after an error.
            queue_events: Events that may wait for it.
            close_seconds: Longest wait for it in `close`.
        """
        self._name = name
        self._open_tracker = open_tracker
        self._cut_off = cut_off
        self._close_seconds = close_seconds
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_events)
        self._given_up = threading.Event()
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def log(self, event: dict[str, Any]) -> None:
        """Leave an event for the tracker; its content must not change any more."""
        if self._given_up.is_set():
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            if not self._num_dropped:
                log.warning(
                    "%s does not keep up: %d events wait, and more are left out there. "
                    "metrics.jsonl has all of them.",
                    self._name,
                    self._events.maxsize,
                )
            self._num_dropped += 1

    def close(self, longest_seconds: float = math.inf) -> None:
        """Give the tracker a limited time to send what is left.

        Args:
            longest_seconds: Shortens that time.
        """
        if self._given_up.is_set():
            return
        seconds = min(self._close_seconds, longest_seconds)
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._events.put(None, timeout=seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return
        self._given_up.set()
        log.warning(
            "%s did not finish within %g s and was cut off. metrics.jsonl has all events.",
            self._name,
            seconds,
        )
        self._end_waiting()
        self._thread.join(CUT_OFF_SECONDS)

    def _work(self) -> None:
        event: dict[str, Any] | None = None
        num_failures = 0
        was_opened = True
        while True:
            tracker = None
            is_second_try = False
            try:
                tracker = self._open_tracker()
                if event is not None:
                    is_second_try = True
                    tracker.log(event)
                    is_second_try = False
                while (event := self._events.get()) is not None:
                    tracker.log(event)
                tracker.close()
                return
            except BaseException as error:  # libraries also leave by SystemExit
                num_failures += 1
                is_closing = tracker is not None and event is None
                is_hopeless = tracker is None and not was_opened
                was_opened = tracker is not None
                self._end_waiting()
                if is_closing or is_hopeless or num_failures > MOST_REOPENINGS:
                    self._give_up(error)
                if self._given_up.is_set():
                    return
                without = ""
                if is_second_try and event is not None:
                    without = f" without the {event.get('event')} event at which it failed twice"
                    event = None
                log.warning(
                    "%s failed (%s) and is opened again%s.", self._name, reason_of(error), without
                )

    def _give_up(self, error: BaseException) -> None:
        """Do without the tracker from now on."""
        if not self._given_up.is_set():
            log.warning(
                "%s failed and is left out from now on (%s). metrics.jsonl goes on.",
                self._name,
                reason_of(error),
            )
        self._given_up.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._events.get_nowait()

    def _end_waiting(self) -> None:
        if self._cut_off is not None:
            with contextlib.suppress(BaseException):
                self._cut_off()
