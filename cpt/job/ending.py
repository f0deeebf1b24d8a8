"""Record how a start of a run ends: in metrics.jsonl, and in last_failure.json if it failed.

done, stopped, paused   the main thread, through telemetry, so that trackers hear of it
refused, failed         the main thread of the first rank, when it has left everything else
hung, killed            the watchdog, just before it ends the process
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cpt.checkpoint.reader import list_steps
from cpt.errors import RequeueRequested, SlowNodeError, cause_and_code
from cpt.job.progress import Progress
from cpt.parallel.topology import Topology
from cpt.resilience.ruling import Ruling
from cpt.telemetry.metrics import Telemetry
from cpt.telemetry.run_end import (
    EndRecord,
    append_event,
    forget_failure,
    read_failure,
    record_failure,
)

log = logging.getLogger("cpt.job.ending")


class Ending:
    """The end of this start of a run, on this rank."""

    def __init__(self, run_dir: Path, topology: Topology, *, observe: bool) -> None:
        """Prepare to record.

        Args:
            run_dir: The run directory.
            topology: Only the first rank writes, unless it is gone.
            observe: The run directory is another job's; nothing is written.
        """
        self._run_dir = run_dir
        self._is_first = topology.rank == 0
        self._observe = observe
        self._is_told = False
        self.progress: Progress | None = None
        """Where the run is; None until it is known where it goes on."""
        self.has_failed_before = False
        """Whether the start before this one failed, as far as rank 0 knows."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record an error that leaves the block, unless telemetry has told of it."""
        if self._is_first and not self._observe:
            self.has_failed_before = read_failure(self._run_dir) is not None
            with contextlib.suppress(OSError):
                forget_failure(self._run_dir)
        try:
            yield
        except Exception as error:
            self._record(error)
            raise

    def tell(self, telemetry: Telemetry, exit_code: int, cause: str) -> None:
        """Log an end that all ranks have come to together."""
        telemetry.log(self._end(exit_code, cause).event())
        self._is_told = True

    def show(self, telemetry: Telemetry, error: Exception) -> None:
        """Tell the trackers of an error that ends the run; `recording` writes it down."""
        if not self._is_told:
            cause, exit_code = cause_and_code(error)
            telemetry.show(self._end(exit_code, cause).event())

    def record_ruling(self, ruling: Ruling) -> None:
        """Record why the watchdog ends this process; it logs nothing, since a hung thread may hold
        the lock.

        Raises:
            OSError: it cannot be written.
        """
        if self._observe:
            return
        end = EndRecord(
            exit_code=ruling.code,
            cause=ruling.text,
            step=self._steps_done(),
            rank=ruling.to_blame() or 0,
            host=ruling.host,
            node=ruling.node,
            signal=ruling.signal,
        )
        record_failure(self._run_dir, end)

    def _record(self, error: Exception) -> None:
        if self._observe or not self._is_first:
            return
        is_stop = isinstance(error, RequeueRequested)
        if is_stop and self._is_told:
            return
        cause, exit_code = cause_and_code(error)
        try:
            end = self._end(exit_code, cause)
            if isinstance(error, SlowNodeError):
                end = replace(end, rank=error.rank, host=error.host, node=error.node)
            if is_stop:
                append_event(self._run_dir, end.event())
            else:
                record_failure(self._run_dir, end)
        except OSError as failed:
            log.warning("the end of the run could not be written down: %s", failed)

    def _end(self, exit_code: int, cause: str) -> EndRecord:
        return EndRecord(exit_code=exit_code, cause=cause, step=self._steps_done())

    def _steps_done(self) -> int:
        if self.progress is not None:
            return self.progress.step
        return max(list_steps(self._run_dir), default=0)
