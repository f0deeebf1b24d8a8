"""Every rank has a log file with its stack traces and warnings; a full disk ends no run."""

from __future__ import annotations

import faulthandler
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cpt.errors import StorageError
from cpt.job import log_files
from cpt.job.log_files import log_path, log_to_file, trace_to_file
from cpt.resilience.environment import rank_of_environment
from data_pipeline.console.log_lines import Verbosity, log_to_terminal

log = logging.getLogger("cpt.job.test")
Start = Callable[..., logging.Logger]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(rank)`: log to the terminal as a new process does, without pytest's own handlers."""
    root = logging.getLogger()
    was_catching = faulthandler.is_enabled()

    def log_alone(rank: int, verbosity: Verbosity = Verbosity.NORMAL) -> logging.Logger:
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setattr(root, "level", root.level)
        log_to_terminal(verbosity, rank=rank)
        return root

    yield log_alone
    for handler in root.handlers:
        handler.close()
    logging.captureWarnings(False)
    if was_catching:
        faulthandler.enable()


@contextmanager
def file_on_a_full_disk(root: logging.Logger, run_dir: Path) -> Iterator[None]:
    """Log to the file of rank 0, to which nothing can be written inside the block."""
    log_to_file(run_dir, 0)
    (file,) = [h for h in root.handlers if isinstance(h, logging.FileHandler)]
    file.stream.close()
    # closing the device fails, as every write to it does
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as no_space_left:
        file.stream = no_space_left
        yield


def test_file_of_a_rank_has_everything_and_is_continued(start: Start, tmp_path: Path) -> None:
    start(3)
    log_to_file(tmp_path, 3)
    log.info("first start")
    log_to_file(tmp_path, 3)
    log.info("second start")
    text = (tmp_path / "logs" / "rank-00003.log").read_text(encoding="utf-8")
    assert "rank 3" in text and "first start" in text and "second start" in text


def test_stack_trace_is_in_the_file_and_the_terminal_names_the_file(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(0)
    log_to_file(tmp_path, 0)
    try:
        raise OSError("cable cut\nsecond line")
    except OSError:
        log.exception("no step was done")
    printed = capsys.readouterr().err
    written = log_path(tmp_path, 0).read_text(encoding="utf-8")
    assert "Traceback" in written and "second line" in written
    assert "Traceback" not in printed and "no step was done: OSError: cable cut\n" in printed
    assert str(log_path(tmp_path, 0)) in printed


def test_error_that_ends_a_run_leaves_its_trace_in_the_file_only(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(3)
    log_to_file(tmp_path, 3)
    try:
        raise StorageError("no room")
    except StorageError as error:
        trace_to_file(error)
    written = log_path(tmp_path, 3).read_text(encoding="utf-8")
    assert "this start ends: no room" in written and "Traceback" in written
    assert capsys.readouterr().err == ""


def test_verbose_shows_the_stack_trace_on_the_terminal_too(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(0, Verbosity.VERBOSE)
    log_to_file(tmp_path, 0)
    try:
        raise OSError("cable cut")
    except OSError:
        log.exception("no step was done")
    assert "Traceback" in capsys.readouterr().err


def test_warnings_of_python_are_in_the_file_once(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(0)
    log_to_file(tmp_path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        for _ in range(3):
            warnings.warn(f"an old name, {tmp_path.name}", FutureWarning, stacklevel=1)
    written = log_path(tmp_path, 0).read_text(encoding="utf-8")
    assert written.count("FutureWarning: an old name") == 1
    assert "an old name" not in capsys.readouterr().err


def test_full_file_is_continued_in_a_new_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MAX_BYTES", 1000)
    start(0)
    log_to_file(tmp_path, 0)
    for number in range(100):
        log.info("line %d", number)
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["rank-00000.log"] + [f"rank-00000.log.{number}" for number in (1, 2, 3)]
    assert "line 99" in log_path(tmp_path, 0).read_text(encoding="utf-8")
    assert all(path.stat().st_size <= 1000 for path in (tmp_path / "logs").iterdir())


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
    with file_on_a_full_disk(start(0), tmp_path):
        for number in range(3):
            log.info("line %d", number)
    printed = capsys.readouterr().err
    assert printed.count("cannot be written any more") == 1
    assert all(f"line {number}" in printed for number in range(3))


def test_stack_traces_are_on_the_terminal_once_the_file_cannot_be_written(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_on_a_full_disk(start(0), tmp_path):
        for words in ("cable cut", "fan stopped"):
            try:
                raise RuntimeError(words)
            except RuntimeError:
                log.exception("no step was done")
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == 2
    assert "\n    RuntimeError: cable cut\n" in printed
    assert "\n    RuntimeError: fan stopped\n" in printed


def test_record_whose_arguments_do_not_fit_costs_no_other(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    start(0)
    log_to_file(tmp_path, 0)
    log.warning("an old name", FutureWarning)
    log.info("goes on")
    written = log_path(tmp_path, 0).read_text(encoding="utf-8")
    assert "goes on" in written and "cannot be written" not in written


@pytest.mark.parametrize(("text", "rank"), [("5", 5), ("", 0), ("five", 0)])
def test_rank_comes_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, text: str, rank: int
) -> None:
    monkeypatch.setenv("RANK", text)
    assert rank_of_environment() == rank
