"""Long commands show a bar on a terminal, and a line now and then in a log."""

from __future__ import annotations

import itertools
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from data_pipeline.console.progress import SECONDS_BETWEEN_LINES, ProgressLines, show_progress

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, time
from data_pipeline.console.log_lines import log_to_terminal
from data_pipeline.console.progress import show_progress
log_to_terminal()
with show_progress(3, "scores", "row") as bar:
    for number in range(3):
        bar.update()
        logging.getLogger("cpt").info("line %d", number)
print("done")
"""


def test_log_has_a_line_every_half_minute_with_the_time_left() -> None:
    told: list[str] = []
    ticks = itertools.count(0, SECONDS_BETWEEN_LINES / 2)
    with ProgressLines(8, "row", what="scores", tell=told.append, clock=lambda: next(ticks)) as bar:
        for _ in range(8):
            bar.update()
    assert len(told) == 4
    assert told[0].startswith("scores: 2 of 8 rows, 25 %,")
    assert told[0].endswith("00:30 so far, 01:30 left")
    assert told[-1].startswith("scores: 8 of 8 rows, 100 %")


def test_short_work_is_worth_no_line() -> None:
    told: list[str] = []
    with ProgressLines(8, "row", what="scores", tell=told.append, clock=lambda: 1.0) as bar:
        bar.update(8)
    assert told == []


def test_items_done_by_an_earlier_start_do_not_make_the_rest_look_fast() -> None:
    told: list[str] = []
    ticks = itertools.count(0, 30)
    lines = ProgressLines(
        100, "row", what="scores", initial=90, tell=told.append, clock=lambda: next(ticks)
    )
    lines.update()
    assert told == ["scores: 91 of 100 rows, 91 %, 30.00s/row, 00:30 so far, 04:30 left"]


def test_bytes_are_shortened() -> None:
    told: list[str] = []
    ticks = itertools.count(0, 30)
    lines = ProgressLines(
        4e9, "B", what="export", unit_scale=True, tell=told.append, clock=lambda: next(ticks)
    )
    lines.update(1.2e9)
    assert told == ["export: 1.20GB of 4.00GB, 30 %, 40.0MB/s, 00:30 so far, 01:10 left"]


def test_work_of_unknown_length_tells_what_is_done() -> None:
    told: list[str] = []
    ticks = itertools.count(0, 30)
    lines = ProgressLines(None, "call", what="task", tell=told.append, clock=lambda: next(ticks))
    lines.update(60)
    assert told == ["task: 60 calls, 2.00call/s, 00:30 so far"]


def test_hidden_progress_counts_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), show_progress(3, "scores", "row", hidden=True) as bar:
        bar.update(2)
        assert bar.n == 2
    assert caplog.records == []


def test_bar_and_log_lines_share_no_line_of_a_terminal() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    written = b""
    try:
        while piece := os.read(master, 65536):
            written += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0
    text = written.decode()
    assert "scores: 100%" in text
    shown = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    for number in range(3):
        assert sum(line.endswith(f"INFO line {number}") for line in shown) == 1
    assert all("scores:" not in line for line in shown if "INFO" in line)


def test_output_that_is_no_terminal_has_no_carriage_return() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, env=environment, check=True
    )
    assert b"\r" not in done.stdout + done.stderr
    assert done.stderr.count(b"INFO line") == 3
