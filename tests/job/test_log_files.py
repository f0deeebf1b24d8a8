"""Log lines say when, which rank and where; every rank has a file; a full disk ends no run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cpt.job.log_files import log_to_file, log_to_terminal
from cpt.resilience.environment import rank_of_environment

log = logging.getLogger("cpt.job.test")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], logging.Logger]:
    """`start(rank)`: log to the terminal as a new process does, without pytest's own handlers."""

    def log_alone(rank: int) -> logging.Logger:
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setattr(root, "level", root.level)
        log_to_terminal(rank)
        return root

    return log_alone


Start = Callable[[int], logging.Logger]


def test_line_has_date_rank_place_and_level(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(0)
    log.info("hello")
    line = capsys.readouterr().err.strip()
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 cpt\.job\.test:\d+ INFO hello"
    assert re.fullmatch(pattern, line), line


def test_other_ranks_tell_only_errors_on_the_terminal(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(3)
    log.info("hello")
    log.error("broken")
    printed = capsys.readouterr().err
    assert "hello" not in printed and "rank 3" in printed and "ERROR broken" in printed


def test_file_of_a_rank_has_everything_and_is_continued(start: Start, tmp_path: Path) -> None:
    start(3)
    log_to_file(tmp_path, 3)
    log.info("first start")
    log_to_file(tmp_path, 3)
    log.info("second start")
    text = (tmp_path / "logs" / "rank-00003.log").read_text(encoding="utf-8")
    assert "rank 3" in text and "first start" in text and "second start" in text


def test_folder_that_cannot_be_made_is_told_and_ends_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("in the way", encoding="utf-8")
    start(0)
    log_to_file(tmp_path, 0)
    log.info("goes on")
    printed = capsys.readouterr().err
    assert "cannot be opened" in printed and "goes on" in printed


def test_failed_write_is_told_once_and_ends_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = start(0)
    log_to_file(tmp_path, 0)
    (file,) = [h for h in root.handlers if isinstance(h, logging.FileHandler)]
    file.stream.close()
    # closing the device fails, as every write to it does
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as no_space_left:
        file.stream = no_space_left
        for number in range(3):
            log.info("line %d", number)
    printed = capsys.readouterr().err
    assert printed.count("cannot be written any more") == 1
    assert all(f"line {number}" in printed for number in range(3))


@pytest.mark.parametrize(("text", "rank"), [("5", 5), ("", 0), ("five", 0)])
def test_rank_comes_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, text: str, rank: int
) -> None:
    monkeypatch.setenv("RANK", text)
    assert rank_of_environment() == rank
