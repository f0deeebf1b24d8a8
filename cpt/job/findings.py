"""Gather the refusals of many checks, so that people get all of them in one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from cpt.errors import (
    ConfigError,
    CptError,
    DataError,
    InternalError,
    StorageError,
    cause_and_code,
)

T = TypeVar("T")


class Findings:
    """The refusals found so far."""

    def __init__(self) -> None:
        self.errors: list[CptError] = []

    def attempt(self, check: Callable[[], T]) -> T | None:
        """Return the result of a check; if it refuses, keep the refusal and return None.

        What the operating system refuses counts, too: one rank that left with it alone would leave
        the others waiting.
        """
        try:
            return check()
        except CptError as error:
            self.errors.append(error)
        except OSError as error:
            cause, code = cause_and_code(error)
            kind = StorageError if code == StorageError.exit_code else InternalError
            refusal = kind(cause)
            refusal.__cause__ = error
            self.errors.append(refusal)
        return None

    def add(self, problems: Sequence[str]) -> None:
        """Keep problems of the configuration that a check has returned."""
        if problems:
            self.errors.append(ConfigError(problems))


def joined(*findings: Findings) -> CptError | None:
    """Return one error that tells everything found, each problem once; None if nothing was found.

    Its exit code is the one whose cure comes first: 78 if the configuration is wrong, else 65 if
    the data is, else that of the first refusal.
    """
    errors: list[CptError] = []
    for found in findings:
        errors += found.errors
    if len(errors) < 2:
        return errors[0] if errors else None
    told: list[str] = []
    for error in errors:
        told += error.problems if isinstance(error, ConfigError) else [str(error)]
    text = "\n".join(dict.fromkeys(told))
    for kind in (ConfigError, DataError):
        if any(isinstance(error, kind) for error in errors):
            return kind(text)
    return type(errors[0])(text)
