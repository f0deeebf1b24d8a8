"""The exit codes of a run, and the exceptions that lead to them.

`ConfigError` (78) and `DataError` (65) come from the data pipeline, which must work without this
package.
"""

from __future__ import annotations

from data_pipeline.errors import ConfigError, CptError, DataError

EXIT_DONE = 0
EXIT_INTERNAL = 70


class InternalError(CptError):
    """Training cannot go on and it is not the user's configuration: non-finite loss, a broken
    invariant.
    """

    exit_code = EXIT_INTERNAL


class EvaluationFailed(DataError):
    """A model that lost more on a listed task than it may; exit code 65, so that no job goes on
    with it.
    """


class HungRankError(CptError):
    """A rank stopped making progress."""

    exit_code = 71


class StorageError(CptError):
    """Disk full, read-only, missing, or a write that failed."""

    exit_code = 74


class CheckpointError(StorageError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file or
    key.
    """


class RequeueRequested(CptError):
    """The run was asked to stop, has saved, and wants to be started again."""

    exit_code = 75


__all__ = [
    "EXIT_DONE",
    "EXIT_INTERNAL",
    "CheckpointError",
    "ConfigError",
    "CptError",
    "DataError",
    "EvaluationFailed",
    "HungRankError",
    "InternalError",
    "RequeueRequested",
    "StorageError",
]
