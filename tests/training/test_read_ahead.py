"""What is read ahead is what would have been read, or it is not handed out."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import traceback

import pytest

from cpt.training import read_ahead
from cpt.training.read_ahead import ReadAhead

HANGS = """
import threading
from cpt.training.read_ahead import ReadAhead
reader = ReadAhead(lambda key: threading.Event().wait())
reader.begin(1)
print("done")
"""


class Recorder:
    """Reads the square of a key, and remembers on which thread."""

    def __init__(self) -> None:
        self.threads: list[tuple[int, str]] = []

    def read(self, key: int) -> int:
        self.threads.append((key, threading.current_thread().name))
        if key < 0:
            raise ValueError(f"no row {key}")
        return key * key


def test_items_come_in_the_order_of_the_keys_and_are_read_on_another_thread() -> None:
    recorder = Recorder()
    reader = ReadAhead(recorder.read)
    found = []
    for key in range(5):
        found.append(reader.take(key))
        reader.begin(key + 1)
    assert found == [0, 1, 4, 9, 16]
    reader.close()
    assert [key for key, _ in recorder.threads] == [0, 1, 2, 3, 4, 5]
    names = {name for _, name in recorder.threads[1:]}
    assert names == {"read ahead"} and recorder.threads[0][1] != "read ahead"


def test_an_item_of_another_key_is_never_handed_out() -> None:
    recorder = Recorder()
    reader = ReadAhead(recorder.read)
    reader.begin(3)
    assert reader.take(7) == 49
    assert reader.take(3) == 9
    assert [key for key, _ in recorder.threads] == [3, 7, 3]


def test_an_error_of_the_reading_surfaces_where_the_item_is_taken() -> None:
    reader = ReadAhead(Recorder().read)
    reader.begin(-1)
    with pytest.raises(ValueError, match="no row -1") as caught:
        reader.take(-1)
    functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert functions[-1] == "read" and "take" in functions
    assert reader.take(2) == 4


def test_an_error_of_what_nobody_asks_for_is_dropped() -> None:
    reader = ReadAhead(Recorder().read)
    reader.begin(-1)
    assert reader.take(2) == 4


def test_no_thread_is_left_after_closing() -> None:
    entered = threading.Event()
    go_on = threading.Event()

    def read(key: int) -> int:
        entered.set()
        go_on.wait()
        return key

    reader = ReadAhead(read)
    reader.begin(1)
    entered.wait()
    assert any(thread.name == "read ahead" for thread in threading.enumerate())
    threading.Timer(0.05, go_on.set).start()
    reader.close()
    assert all(thread.name != "read ahead" for thread in threading.enumerate())


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "CLOSING_SECONDS", 0.05)
    go_on = threading.Event()
    reader = ReadAhead(lambda key: go_on.wait())
    reader.begin(1)
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 10
    go_on.set()


def test_a_reading_that_hangs_does_not_keep_the_process_alive() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == b"done\n"
