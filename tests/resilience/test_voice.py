"""The watchdog says what it can, and waits for nobody who should hear it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from cpt.resilience.voice import Voice


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """Standard error of this process is a pipe without room; yields the end to read from."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        yield reader
    finally:
        os.dup2(kept, 2)
        for descriptor in (reader, writer, kept):
            os.close(descriptor)


def drained(reader: int) -> bytes:
    """Return what a pipe holds, and what waits to be written into it."""
    os.set_blocking(reader, False)
    text = b""
    deadline = time.monotonic() + 60
    while b"\n" not in text and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 2**20)
        time.sleep(0.01)
    return text.lstrip(bytes(1))


def test_line_that_nobody_reads_holds_up_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt.resilience.voice.SAY_SECONDS", 0.1)
    voice = Voice()

    def speak() -> None:
        voice.say("first")
        voice.say("second")

    with full_pipe() as reader:
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(30)
        is_held_up = speaker.is_alive()
        text = drained(reader)
        speaker.join(30)
    assert text.startswith(b"watchdog: first\n")
    assert not is_held_up


def test_line_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpt.resilience.voice.os.write", full)
    Voice().say("rank 1 does not answer")


def test_line_is_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    Voice().say("all\x1b[2J is \udcff\nwell")
    assert capfd.readouterr().err == "watchdog: all\\x1b[2J is \\udcff\\nwell\n"
