"""Log lines say when, which rank, where and how bad; --quiet and --verbose; libraries are muted."""

from __future__ import annotations

import argparse
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.commands import CommandParser
from data_pipeline.console.log_lines import (
    MUTED,
    Verbosity,
    log_to_terminal,
    mute_libraries,
    terminal_shows,
    verbosity_of,
)

log = logging.getLogger("cpt.job.test")
library = logging.getLogger("some_library")
Start = Callable[..., None]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(...)`: log to the terminal as a new process does, without pytest's own handlers."""
    root = logging.getLogger()
    hook = threading.excepthook

    def log_alone(verbosity: Verbosity = Verbosity.NORMAL, rank: int | None = None) -> None:
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setattr(root, "level", root.level)
        log_to_terminal(verbosity, rank=rank)

    yield log_alone
    logging.captureWarnings(False)
    threading.excepthook = hook
    for name in ("cpt", "data_pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)


def lines_about(name: str) -> None:
    logger = logging.getLogger(name)
    logger.debug("detail of %s", name)
    logger.info("news of %s", name)
    logger.warning("warning of %s", name)
    logger.error("error of %s", name)


def test_line_of_a_rank_has_date_rank_place_and_level(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(rank=0)
    log.info("hello")
    line = capsys.readouterr().err.strip()
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 cpt\.job\.test:\d+ INFO hello"
    assert re.fullmatch(pattern, line), line


def test_line_of_a_command_has_date_and_level(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    log.warning("hello")
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING hello", line), line


def test_other_ranks_tell_only_errors_on_the_terminal(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(rank=3)
    log.info("hello")
    log.error("broken")
    printed = capsys.readouterr().err
    assert "hello" not in printed and "rank 3" in printed and "ERROR broken" in printed


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ([], ["news of cpt.a", "warning of cpt.a", "error of cpt.a", "error of some_library"]),
        (["--quiet"], ["warning of cpt.a", "error of cpt.a", "error of some_library"]),
        (
            ["--verbose"],
            [
                "detail of cpt.a",
                "news of cpt.a",
                "warning of cpt.a",
                "error of cpt.a",
                "news of some_library",
                "warning of some_library",
                "error of some_library",
            ],
        ),
    ],
    ids=["default", "quiet", "verbose"],
)
def test_verbosity_says_what_is_told(
    start: Start, capsys: pytest.CaptureFixture[str], option: list[str], told: list[str]
) -> None:
    start(verbosity_of(CommandParser().parse_args(option)))
    lines_about("cpt.a")
    lines_about("some_library")
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=3)[3] for line in printed] == told


def test_carriage_return_in_a_text_does_not_reach_the_log(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    log.info("sampled: one\rtwo")
    assert "one\\rtwo" in capsys.readouterr().err


def test_no_record_steers_the_terminal_or_begins_a_line_of_its_own(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "x\x1b]0;owned\x07\x1b[2J\n2026-11-27 00:00:00 INFO verified ok\x9b\u202e\ud800"
    start()
    log.info("read %s", Path(hostile))
    try:
        raise RuntimeError(hostile)
    except RuntimeError:
        logging.getLogger("some_library").exception("failed: %s", hostile)
    told = capsys.readouterr().err
    assert not set(told) & set("\x1b\x07\x9b\u202e\ud800")
    assert r"x\x1b]0;owned\x07\x1b[2J" in told
    starts = [line for line in told.splitlines() if not line.startswith("    ")]
    assert len(starts) == 2 and "INFO read" in starts[0] and "ERROR failed" in starts[1]


def test_deepspeed_prints_nothing_by_itself_and_its_errors_are_told(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    own = logging.getLogger("DeepSpeed")
    own.warning("Setting accelerator to CPU.")
    own.error("broken")
    printed = capsys.readouterr()
    assert printed.out == "" and "accelerator" not in printed.err
    assert printed.err.count("broken") == 1


def test_error_that_ends_a_thread_is_logged(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    thread = threading.Thread(target=lambda: 1 // 0, name="reader")
    thread.start()
    thread.join()
    printed = capsys.readouterr().err
    assert "ERROR reader ended with an error" in printed and "ZeroDivisionError" in printed


def test_libraries_are_muted_but_not_against_the_users_will() -> None:
    variables = {"TRANSFORMERS_VERBOSITY": "info"}
    mute_libraries(Verbosity.NORMAL, variables)
    assert variables == {**MUTED, "TRANSFORMERS_VERBOSITY": "info"}
    variables = {}
    mute_libraries(Verbosity.VERBOSE, variables)
    assert variables == {}


@pytest.mark.parametrize("words", [["--quiet", "do"], ["do", "--quiet"]], ids=" ".join)
def test_verbosity_may_stand_before_and_after_a_subcommand(words: list[str]) -> None:
    parser = CommandParser(prog="p")
    parser.add_subparsers().add_parser("do")
    assert verbosity_of(parser.parse_args(words)) is Verbosity.QUIET


def test_quiet_terminal_shows_no_news(start: Start) -> None:
    start(Verbosity.QUIET)
    assert not terminal_shows(logging.INFO) and terminal_shows(logging.WARNING)


def test_help_shows_the_defaults_that_its_texts_do_not_tell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = CommandParser(prog="p")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--out", help="file")
    parser.add_argument("--step", default=3, help="default: the newest")
    parser.add_argument("--flag", action="store_true", help="a flag")
    parser.add_argument("--name", action="append", default=[], help="a name")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "seed of the draws (default: 0)" in text
    assert text.count("(default:") == 1


def test_every_option_of_the_commands_with_a_default_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from data_pipeline.__main__ import main

    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert re.search(r"documents per source at most\s+\(default: \d+\)", capsys.readouterr().out)


def test_parser_without_options_is_normal() -> None:
    assert verbosity_of(argparse.Namespace()) is Verbosity.NORMAL
