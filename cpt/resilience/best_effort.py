"""Work beside training: what fails there costs one warning, never the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cpt.errors import CptError

log = logging.getLogger("cpt.resilience.best_effort")


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Warn of an error of the block, and go on.

    The block must not wait for other ranks: one that gave up half-way would leave them waiting.

    Args:
        what: What cannot be done then, as the subject of a sentence.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s: %s. Training is not affected.", what, reason_of(error))
        log.debug("%s", what, exc_info=True)


def reason_of(error: BaseException) -> str:
    """Return one line on an error, for people."""
    if isinstance(error, CptError):
        return str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = str(error).strip().splitlines()
    text = f": {lines[0].rstrip('.')}" if lines else ""
    return f"{type(error).__name__}{text}"
