"""Exceptions that people are meant to read, each with the exit code that the process ends with.

Codes follow sysexits.h where it has a fitting one. `cpt.errors` adds those that only training can
raise.

Decisions
    `explain` is the last resort of every command: it knows what a person, a file or a machine can
    cause. Whatever it does not know is a bug, whose stack trace `keep_trace` puts into a file.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from data_pipeline.escaping import escaped_line, escaped_text

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it."""


INDENTED_BREAK = "\n    "
"""Between the first line of a message and those that belong to it: a text from outside that holds
line breaks cannot pass for a line of ours.
"""


def indented(text: str) -> str:
    """Return a text whose lines after the first are indented."""
    return text.replace("\n", INDENTED_BREAK)


class CptError(Exception):
    """Base of every error that this project raises on purpose; shown without a stack trace."""

    exit_code = EXIT_INTERNAL

    def shown(self) -> str:
        """Return the message for a terminal: what it names from outside begins no line."""
        return indented(str(self))


class ConfigError(CptError):
    """A configuration that cannot be right; it holds every problem found, not only the first."""

    exit_code = 78

    def __init__(self, problems: str | Sequence[str]) -> None:
        if isinstance(problems, str):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def shown(self) -> str:
        """Return the problems for a terminal, each beginning a line."""
        return "\n".join(map(indented, self.problems))


class DataError(CptError):
    """Input data or a build that cannot be used; the message names the file."""

    exit_code = 65


class StorageError(CptError):
    """A disk that is full, read-only or missing, a limit of the system, or a write that failed."""

    exit_code = 74


_CURES = {
    errno.EMFILE: " Raise the limit on open files: ulimit -n 65536 (its hard limit may be lower).",
    errno.ENFILE: " The machine as a whole has too many open files.",
    errno.ENOSPC: " Free space, or choose another place.",
    errno.EDQUOT: " Free space in your quota, or choose another place.",
    errno.EROFS: " Choose another place.",
    errno.EACCES: " Change the permissions, or choose another place.",
    errno.EPERM: " Change the permissions, or choose another place.",
}


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return (message, exit code) of an error that is no bug of this project; None for a bug."""
    if isinstance(error, CptError):
        return error.shown(), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", EXIT_INTERRUPTED
    if isinstance(error, MemoryError):
        reason = "not enough memory. Use fewer --workers, or a machine with more memory."
        return reason, StorageError.exit_code
    if isinstance(error, OSError):
        place = escaped_line(error.filename or "storage")
        cure = _CURES.get(error.errno or 0, "")
        return f"{place}: {error.strerror or error}.{cure}", StorageError.exit_code
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        return unnamable(error.object), ConfigError.exit_code
    return None


def is_of_storage(error: BaseException) -> bool:
    """Return whether an error of the operating system is about a file or a limit on files."""
    if not isinstance(error, OSError):
        return False
    return error.filename is not None or error.errno in _CURES


def unnamable(name: str) -> str:
    """Return what to say of a file name that the locale of this process has no bytes for."""
    return (
        f"'{escaped_line(name, 200)}' is no file name in this locale, whose encoding is "
        f"{sys.getfilesystemencoding()}. Set PYTHONUTF8=1 or LC_ALL=C.UTF-8 in the environment."
    )


def keep_trace(error: BaseException, program: str) -> str:
    """Write the stack trace of a bug to a file of its own, and return what to tell a person."""
    trace = "".join(traceback.format_exception(error))
    words = escaped_line(f"{type(error).__name__}: {error}".splitlines()[0])
    try:
        descriptor, path = tempfile.mkstemp(prefix=f"{program}-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(escaped_text(trace))
    except OSError:
        return f"{trace}internal error: {words}. This is a bug of {program}: please report it."
    return (
        f"internal error: {words}. This is a bug of {program}: please report it with the stack "
        f"trace in {path}."
    )
