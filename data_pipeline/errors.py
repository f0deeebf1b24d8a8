"""Exceptions that people are meant to read, each with the exit code that the process ends with.

Codes follow sysexits.h where it has a fitting one. `cpt.errors` adds those that only training can
raise.
"""

from __future__ import annotations

from collections.abc import Sequence


class CptError(Exception):
    """Base of every error that this project raises on purpose; shown without a stack trace."""

    exit_code = 70


class ConfigError(CptError):
    """A configuration that cannot be right; it holds every problem found, not only the first."""

    exit_code = 78

    def __init__(self, problems: str | Sequence[str]) -> None:
        if isinstance(problems, str):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(CptError):
    """Input data or a build that cannot be used; the message names the file."""

    exit_code = 65
