"""One log file per rank: `<run_dir>/logs/rank-00000.log`.

It has everything that this rank logs, stack traces, Python's warnings and what libraries say
included, whatever the terminal shows, and the stack of a crash in C code.  A restarted run appends
to it.  A file that has grown to `MAX_BYTES` is continued in a new one; the `NUM_OLDER` before it
are kept as rank-00000.log.1, .2 and so on.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from data_pipeline.console.log_lines import LineFormatter, keep_traces_in, show_traces
from data_pipeline.store.files import no_links

FOLDER = "logs"
MAX_BYTES = 64 * 2**20
NUM_OLDER = 3

log = logging.getLogger("cpt.job.log_files")


class _RankFile(RotatingFileHandler):
    """A log file that gives up at its first failed write: a full disk must not end a run.

    A record that cannot be put into words, because its arguments do not fit, is left out.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            return
        logging.getLogger().removeHandler(self)
        show_traces()
        # the terminal has just named this file for it; that of `trace_to_file` is for the file only
        trace = None if record.name == log.name else record.exc_info
        log.error(
            "%s cannot be written any more; this rank goes on without it.",
            self.baseFilename,
            exc_info=trace,
        )

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=no_links)

    def doRollover(self) -> None:
        super().doRollover()
        self.take_crashes()

    def take_crashes(self) -> None:
        """Let Python write its stack into this file if it is ended by a signal such as SIGSEGV."""
        # a stream of its own, which stays open while this one changes
        faulthandler.enable(self._open())


def log_path(run_dir: Path, rank: int) -> Path:
    """Return the log file of a rank."""
    return run_dir / FOLDER / f"rank-{rank:05d}.log"


def log_to_file(run_dir: Path, rank: int) -> None:
    """Log everything of this rank to its file in the run directory as well.

    A file that cannot be opened is told and does without.
    """
    path = log_path(run_dir, rank)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handler = _RankFile(path, maxBytes=MAX_BYTES, backupCount=NUM_OLDER, encoding="utf-8")
        handler.take_crashes()
    except OSError as error:
        log.error("%s cannot be opened (%s); this rank goes on without it.", path, error.strerror)
        return
    handler.setFormatter(LineFormatter(rank))
    logging.getLogger().addHandler(handler)
    keep_traces_in(path)


def trace_to_file(error: BaseException) -> None:
    """Log the stack trace of an error to this rank's file only, if it has one.

    The terminal gets the message of such an error from whoever speaks for the node.
    """
    record = log.makeRecord(
        log.name,
        logging.ERROR,
        __file__,
        0,
        "this start ends: %s",
        (error,),
        (type(error), error, error.__traceback__),
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RankFile):
            handler.handle(record)
