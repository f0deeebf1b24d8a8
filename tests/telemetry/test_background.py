"""A tracker in a thread of its own can neither raise into training nor make it wait."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cpt.telemetry.background import MOST_REOPENINGS, BackgroundTracker

EVENT = {"event": "step", "step": 1}


class Recorder:
    """A tracker that remembers, and does something else where it is told to."""

    def __init__(self, on_log: Callable[[], None] = lambda: None) -> None:
        self.events: list[dict[str, Any]] = []
        self.is_closed = False
        self.on_log = on_log

    def log(self, event: dict[str, Any]) -> None:
        self.on_log()
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


def fail() -> None:
    raise BrokenPipeError(32, "Broken pipe")


def leave() -> None:
    sys.exit(3)


def test_events_arrive_in_order_and_the_tracker_is_closed() -> None:
    recorder = Recorder()
    tracker = BackgroundTracker("it", lambda: recorder)
    events = [{"event": "step", "step": number} for number in range(100)]
    for event in events:
        tracker.log(event)
    tracker.close()
    assert recorder.events == events and recorder.is_closed


@pytest.mark.parametrize("error", [fail, leave])
def test_tracker_that_fails_again_and_again_is_left_out(
    error: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    cut_off = threading.Event()
    tracker = BackgroundTracker("it", lambda: Recorder(error), cut_off=cut_off.set)
    for _ in range(5):
        tracker.log(EVENT)
    tracker.close()
    tracker.log(EVENT)
    assert cut_off.is_set()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 + MOST_REOPENINGS
    assert messages[0].startswith("it failed (") and messages[0].endswith("and is opened again.")
    assert messages[-1].startswith("it failed and is left out from now on")
    assert not any(record.exc_info for record in caplog.records)


def test_tracker_whose_helper_was_killed_is_opened_again_and_misses_nothing() -> None:
    recorders = [Recorder(), Recorder()]
    opened = iter(recorders)

    def fail_at_3() -> None:
        if len(recorders[0].events) == 2:
            fail()

    recorders[0].on_log = fail_at_3
    tracker = BackgroundTracker("it", lambda: next(opened))
    events = [{"event": "step", "step": number} for number in range(1, 6)]
    for event in events:
        tracker.log(event)
    tracker.close()
    assert recorders[0].events + recorders[1].events == events
    assert recorders[1].is_closed and not recorders[0].is_closed


def test_event_that_no_tracker_takes_is_left_out_alone(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[int] = []

    class Picky(Recorder):
        def log(self, event: dict[str, Any]) -> None:
            if event["step"] == 2:
                fail()
            taken.append(event["step"])

    tracker = BackgroundTracker("it", Picky)
    for number in range(1, 6):
        tracker.log({"event": "checkpoint", "step": number})
    tracker.close()
    assert taken == [1, 3, 4, 5]
    assert "opened again without the checkpoint event at which it failed twice." in caplog.text
    assert "left out from now on" not in caplog.text


def test_tracker_that_cannot_be_opened_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def open_tracker() -> Recorder:
        raise OSError(28, "No space left on device", "place/of/files")

    tracker = BackgroundTracker("it", open_tracker)
    tracker.log(EVENT)
    tracker.close()
    assert "(place/of/files: No space left on device)" in caplog.text


def test_tracker_that_raises_in_close_is_told(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.close = fail  # type: ignore[method-assign]
    BackgroundTracker("it", lambda: recorder).close()
    assert "it failed and is left out" in caplog.text


def test_tracker_that_blocks_holds_up_nobody_and_is_cut_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    released = threading.Event()
    recorder = Recorder(on_log=lambda: released.wait(60) and None)  # type: ignore[func-returns-value]
    tracker = BackgroundTracker(
        "it", lambda: recorder, cut_off=released.set, queue_events=3, close_seconds=0.2
    )
    started = time.monotonic()
    for _ in range(1000):
        tracker.log(EVENT)
    assert time.monotonic() - started < 5
    tracker.close()
    assert released.is_set() and time.monotonic() - started < 10
    assert caplog.text.count("it does not keep up") == 1
    tracker.close()
    assert caplog.text.count("it did not finish within 0.2 s and was cut off") == 1


def test_tracker_that_blocks_while_it_opens_holds_up_nobody() -> None:
    released = threading.Event()

    def open_tracker() -> Recorder:
        released.wait(60)
        return Recorder()

    tracker = BackgroundTracker("it", open_tracker, cut_off=released.set, close_seconds=0.1)
    tracker.log(EVENT)
    tracker.close()
    assert released.is_set()
