"""Log lines on the terminal: their form, how many of them there are, and whose they are.

    --quiet      warnings and errors
    (neither)    what this project tells: INFO and above; of libraries only errors
    --verbose    DEBUG and above of this project, and all that libraries say

Decisions
    A line above a progress bar is written through tqdm, so that the two never share a line.
    A log line holds nothing that steers a terminal, whatever is logged, and the lines after the
    first are indented: no text from outside can pass for a line of ours.
    DeepSpeed prints on stdout by a handler of its own. Its records are taken over, so that they
    reach the terminal and the file of a rank as all others do.
    Libraries read what they may say from environment variables when they are imported. So these
    are set first thing, unless the user has set them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from enum import Enum
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import indented
from data_pipeline.escaping import escaped_text

FORMAT = "%(asctime)s %(levelname)s %(message)s"
"""A line of a command."""
RANK_FORMAT = "%(asctime)s rank %(rank)s %(name)s:%(lineno)d %(levelname)s %(message)s"
"""A line of a process that has a rank."""
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
OWN_LOGGERS = ("cpt", "data_pipeline")
"""The first words of the names of this project's loggers."""
MOST_WARNINGS = 10_000
"""Different warnings of Python that a process tells."""
MUTED = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables by which datasets, the Hugging Face Hub (and transformers, which asks it), torch's C++
code, tqdm (where no caller says otherwise) and transformers are told to keep quiet.
"""


class Verbosity(Enum):
    """How much a process tells on the terminal."""

    QUIET = logging.WARNING
    NORMAL = logging.INFO
    VERBOSE = logging.DEBUG


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` and `--verbose`; a parser and its subparsers may all have them."""
    group = parser.add_mutually_exclusive_group()
    # no default: that of a subparser would overwrite what was given before its name
    for name, text in (
        ("quiet", "only warnings and errors, and the result"),
        ("verbose", "also details, and what libraries say"),
    ):
        group.add_argument(
            f"--{name}", action="store_true", default=argparse.SUPPRESS, help=f"tell {text}"
        )


def verbosity_of(options: argparse.Namespace) -> Verbosity:
    """Return what a command line asks for; the more talkative one if it asks for both."""
    if getattr(options, "verbose", False):
        return Verbosity.VERBOSE
    return Verbosity.QUIET if getattr(options, "quiet", False) else Verbosity.NORMAL


class LineFormatter(logging.Formatter):
    """Adds the rank to every record, whoever logs it, and makes its text safe to show."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__(FORMAT if rank is None else RANK_FORMAT, DATE_FORMAT)
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        record.rank = self._rank
        return indented(escaped_text(super().format(record)))


class TerminalHandler(logging.Handler):
    """Writes lines to what stderr is at the moment, above any progress bar."""

    traces_in: Path | None = None
    """The file that has the stack traces; the terminal then shows where they are.  None shows the
    traces themselves.
    """

    @property
    def stream(self) -> TextIO:
        """The stream that lines go to."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # reads the variables of `mute_libraries` when it is imported

        try:
            shown = record if self.traces_in is None else without_trace(record, self.traces_in)
            tqdm.write(self.format(shown), file=self.stream)
            self.stream.flush()
        except Exception:
            self.handleError(record)


def without_trace(record: logging.LogRecord, trace_file: Path) -> logging.LogRecord:
    """Return a record with the first line of its error, and the file that has the stack trace."""
    if not record.exc_info or record.exc_info[1] is None:
        return record
    error = record.exc_info[1]
    shown = copy.copy(record)
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    shown.msg = f"{record.getMessage()}: {words}\nThe stack trace is in {trace_file}."
    shown.args = ()
    shown.exc_info = None
    shown.exc_text = None
    return shown


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Return whether a record is this project's, or an error."""
    return record.name.split(".")[0] in OWN_LOGGERS or record.levelno >= logging.ERROR


def log_to_terminal(
    verbosity: Verbosity = Verbosity.NORMAL, *, rank: int | None = None
) -> TerminalHandler:
    """Log to stderr, in place of what an earlier call set up.

    Args:
        verbosity: How much the first rank tells; the others tell only errors.
        rank: Rank of this process; None for one that has no place among ranks.

    Returns:
        The handler, which the root logger has.
    """
    handler = TerminalHandler(logging.ERROR if rank else verbosity.value)
    handler.setFormatter(LineFormatter(rank))
    if verbosity is not Verbosity.VERBOSE:
        handler.addFilter(is_worth_telling)
    root = logging.getLogger()
    for earlier in list(root.handlers):
        if isinstance(earlier, TerminalHandler):
            root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(min(logging.INFO, verbosity.value))
    logging.captureWarnings(True)
    _filter_once("py.warnings", OncePerText)
    threading.excepthook = _log_death_of_thread
    _filter_once("DeepSpeed", _ToRoot)
    return handler


def keep_traces_in(file: Path) -> None:
    """Show no stack trace on the terminal from now on, because a file has them.

    With --verbose they are shown all the same.
    """
    if terminal_shows(logging.DEBUG):
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TerminalHandler):
            handler.traces_in = file


def show_traces() -> None:
    """Show stack traces on the terminal from now on, because no file has them any more."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TerminalHandler):
            handler.traces_in = None


def terminal_shows(level: int) -> bool:
    """Return whether lines of a level reach the terminal; True where nothing is set up."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TerminalHandler):
            return level >= handler.level
    return True


def mute_libraries(verbosity: Verbosity, variables: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that keep libraries quiet; what the user has set stays.

    This must happen before the libraries are imported.
    """
    if verbosity is Verbosity.VERBOSE:
        return
    for name, value in MUTED.items():
        variables.setdefault(name, value)


def _log_death_of_thread(death: threading.ExceptHookArgs) -> None:
    """Log the error that ended a thread, which Python would print."""
    if death.exc_type is SystemExit or death.exc_value is None:
        return
    name = death.thread.name if death.thread else "a thread"
    trace = (death.exc_type, death.exc_value, death.exc_traceback)
    logging.getLogger("cpt.thread").error("%s ended with an error", name, exc_info=trace)


def _filter_once(name: str, kind: type[logging.Filter]) -> None:
    """Give a logger a filter, unless it has one of this kind."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, kind) for known in logger.filters):
        logger.addFilter(kind())


class OncePerText(logging.Filter):
    """Passes every text once; some libraries warn in every step, whatever Python's filters say."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in self._seen or len(self._seen) >= MOST_WARNINGS:
            return False
        self._seen.add(text)
        return True


class _ToRoot(logging.Filter):
    """Hands every record to the root logger's handlers, and to no other."""

    def filter(self, record: logging.LogRecord) -> bool:
        logging.getLogger().handle(record)
        return False
