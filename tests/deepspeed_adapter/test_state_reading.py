"""Who changes the state waits for a thread that reads it, and nobody else does."""

from __future__ import annotations

import threading

from cpt.deepspeed_adapter.state_reading import StateReading


def test_nothing_waits_if_nothing_is_read() -> None:
    reading = StateReading()
    reading.wait()
    assert not reading.is_open and reading.waited_seconds == 0.0


def test_writer_waits_until_everything_is_read() -> None:
    reading = StateReading()
    reading.begin()
    order = []

    def read() -> None:
        order.append("read")
        reading.end()

    threading.Timer(0.05, read).start()
    reading.wait()
    order.append("written")
    assert order == ["read", "written"] and reading.waited_seconds >= 0.03
    reading.wait()
    assert not reading.is_open, "the second writer does not wait again"


def test_reading_stays_open_for_the_ranks_whose_thread_was_fast() -> None:
    """All ranks enter the same phases, however long their own copies took."""
    reading = StateReading()
    reading.begin()
    reading.end()
    assert reading.is_open
    reading.wait()
    assert not reading.is_open


def test_end_may_be_told_twice() -> None:
    reading = StateReading()
    reading.begin()
    reading.end()
    reading.end()
    reading.wait()
    reading.begin()
    assert reading.is_open
