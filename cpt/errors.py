"""The exit codes of a run, and the exceptions that lead to them.

`ConfigError` (78), `DataError` (65) and `StorageError` (74) come from the data pipeline, which must
work without this package.
"""

from __future__ import annotations

from data_pipeline.errors import (
    EXIT_INTERNAL,
    ConfigError,
    CptError,
    DataError,
    StorageError,
    explain,
    is_of_storage,
)

EXIT_DONE = 0


class InternalError(CptError):
    """A run that cannot go on for no fault of its configuration, such as a non-finite loss."""

    exit_code = EXIT_INTERNAL


class SlowNodeError(InternalError):
    """A node that others cannot reach as fast as the configuration demands.

    Every rank raises it; `rank`, `host` and `node` are those of the slow node, for who restarts
    the job without it.
    """

    def __init__(self, text: str, *, rank: int = 0, host: str = "", node: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.host = host
        self.node = node


class EvaluationFailed(DataError):
    """A model that lost more on a task than it may; the exit code keeps jobs from going on."""


class HungRankError(CptError):
    """A rank that stopped making progress."""

    exit_code = 71


class CheckpointError(StorageError):
    """A checkpoint that cannot be written or trusted; the message names the file or key."""


class RequeueRequested(CptError):
    """A run that was asked to stop, has saved, and wants to be started again."""

    exit_code = 75


class StageFinished(RequeueRequested):
    """A run that has saved and goes on in the layout of another stage, in the same processes.

    Its exit code is that of who cannot go on by itself.
    """


def cause_and_code(error: BaseException) -> tuple[str, int]:
    """Return what an error of a run says, and the exit code that it leads to.

    A file that cannot be read or written is a matter of storage (74), as it is for every command.
    Network errors are not, although Python derives them from OSError, too, and lack of memory is
    told with its stack trace.
    """
    if isinstance(error, CptError) or is_of_storage(error):
        explained = explain(error)
        if explained is not None:
            return explained
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}", EXIT_INTERNAL


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
    "SlowNodeError",
    "StageFinished",
    "StorageError",
    "cause_and_code",
]
