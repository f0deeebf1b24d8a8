"""Log lines with date, rank and place, on the terminal and in one file per rank.

The first rank tells everything on the terminal, the others only errors.  The file of a rank,
`<run_dir>/logs/rank-00000.log`, has everything that this rank logs; a restarted run appends to it.
"""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s rank %(rank)s %(name)s:%(lineno)d %(levelname)s %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
FOLDER = "logs"

log = logging.getLogger("cpt.job.log_files")


class _RankFormatter(logging.Formatter):
    """Adds the rank to every record, whoever logs it."""

    def __init__(self, rank: int) -> None:
        super().__init__(FORMAT, DATE_FORMAT)
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        record.rank = self._rank
        return super().format(record)


class _RankFile(logging.FileHandler):
    """A log file that gives up at its first failed write: a full disk must not end a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        log.error("%s cannot be written any more; this rank goes on without it.", self.baseFilename)


def log_to_terminal(rank: int) -> None:
    """Log to stderr: everything on the first rank, errors on the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RankFormatter(rank))
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_to_file(run_dir: Path, rank: int) -> None:
    """Log everything of this rank to its file in the run directory as well.

    A file that cannot be opened is told and does without.
    """
    path = run_dir / FOLDER / f"rank-{rank:05d}.log"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handler = _RankFile(path, encoding="utf-8")
    except OSError as error:
        log.error("%s cannot be opened (%s); this rank goes on without it.", path, error.strerror)
        return
    handler.setFormatter(_RankFormatter(rank))
    logging.getLogger().addHandler(handler)
