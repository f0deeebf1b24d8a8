"""Work that does not end keeps nobody who waits for it only so long."""

from __future__ import annotations

import threading
import time

import pytest

from cpt.resilience.time_limit import at_most


def test_work_that_does_not_end_is_left_behind() -> None:
    release = threading.Event()

    def stay() -> None:
        release.wait(60)

    started = time.monotonic()
    assert not at_most(0.1, stay, "stuck")
    assert time.monotonic() - started < 30
    release.set()


def test_work_that_ends_or_fails_has_ended() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    done = threading.Event()
    assert at_most(60, done.set, "quick") and done.is_set()
    assert at_most(60, full, "full disk")


def test_system_that_gives_no_thread_does_not_end_the_one_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not at_most(60, lambda: None, "none")
