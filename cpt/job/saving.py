"""Save a run periodically, at its end, and before it leaves on request.

A periodic save that fails costs one error line; the last one is the run's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

from cpt.checkpoint.save_in_progress import Published
from cpt.checkpoint.staging import Way
from cpt.errors import RequeueRequested, StorageError
from cpt.job.job import Job
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.best_effort import best_effort
from cpt.resilience.stop import Deadline

log = logging.getLogger("cpt.job.saving")

ACCOUNT_SECONDS = 5.0
"""Longest time that a run that leaves on request reads its log for the account of its time: its job
may be about to end.  Usually the steps since the last line about one are all that is left to read.
"""
TOLD: dict[Way, str] = {
    "copy": "asynchronous",
    "stream": "asynchronous without a copy, the next update waits until it is written",
    "wait": "training waits",
}
"""How a save is made, for the log."""


def periodic_save(job: Job) -> None:
    """Save and go on training; a failure costs one error line.

    Raises:
        RequeueRequested: a stop was asked for while training stood still for the save.
    """
    step = job.progress.step
    job.clock.enter("save", step)  # waiting for the save in flight takes as long as a save
    publish(job)
    way = job.saver.way
    tell_begin(job, way)
    with told_failure(job, step):
        if way != "wait":
            job.saver.start(step, job.state(), keep=is_green(job))
            return
        log_checkpoint(job, job.saver.save_now(step, job.state(), keep=is_green(job)))
    if agreed_reason(job.stop, job.topology.control_group):  # it came while all stood still
        leave(job)


def final_save(job: Job) -> None:
    """Save before leaving; a failure ends the run.

    Raises:
        StorageError: it could not be saved; older checkpoints are intact.
    """
    save_last(job, in_haste=False)
    job.saver.close()


def save_last(job: Job, *, in_haste: bool) -> None:
    """Save, and do not wait until older checkpoints are deleted.

    Args:
        job: The run.
        in_haste: The time is limited; see `Saver.save_now`.

    Raises:
        StorageError: it could not be saved; older checkpoints are intact.
    """
    step = job.progress.step
    job.clock.enter("save", step)  # waiting for the save in flight takes as long as a save
    publish(job)
    tell_begin(job, "wait")
    done = job.saver.save_now(step, job.state(), keep=is_green(job), in_haste=in_haste)
    log_checkpoint(job, done)


def is_green(job: Job) -> bool:
    """Return whether the checkpoint of the present step is the one to go back to."""
    return job.guard is not None and job.guard.state.green_step == job.progress.step


def leave(job: Job) -> NoReturn:
    """Save and leave, because a request to stop has reached all ranks.

    Raises:
        RequeueRequested: saved.
        StorageError: it could not be saved.
    """
    reason = agreed_reason(job.stop, job.topology.control_group)
    job.stop.consume()
    seconds = job.stop.seconds_to_leave(job.config.checkpoint.stop_budget_seconds)
    deadline = Deadline(seconds, f"saving step {job.progress.step} before leaving")
    save_last(job, in_haste=True)
    deadline.cancel()
    job.saver.close_in_haste(deadline.seconds_left())  # a deletion may be cut off anywhere
    stopped = RequeueRequested(
        f"stopped on request after step {job.progress.step}: {reason}. Saved; start again to go on."
    )
    end(job, stopped.exit_code, str(stopped), ACCOUNT_SECONDS)
    raise stopped


def end(job: Job, exit_code: int, cause: str, account_seconds: float = math.inf) -> None:
    """Log the end of training, and where the time of all starts of the run went.

    Args:
        job: The run.
        exit_code: What the processes are about to end with.
        cause: Why training ends, in one line.
        account_seconds: Longest time to read what of the log was not read yet.
    """
    job.context.ending.tell(job.telemetry, exit_code, cause)
    if job.topology.rank == 0:
        with best_effort("The time of the run is not accounted for"):
            spent = job.telemetry.goodput(account_seconds)
            if spent is None:
                log.info("the log is too long to account for the time of the run before leaving")
                return
            job.telemetry.log(spent.event(job.progress.step))
            log.info("%s", spent.describe())


def publish(job: Job, settled_ranks: int | None = None) -> None:
    """Go on with the save in flight, if every rank has done its part.

    Args:
        job: The run.
        settled_ranks: How many ranks have done their part; None waits until it is published.
    """
    with told_failure(job, job.saver.step_in_flight):
        if settled_ranks is None:
            done = job.saver.finish()
        else:
            done = job.saver.advance(settled_ranks)
        if done is not None:
            log_checkpoint(job, done)


@contextmanager
def told_failure(job: Job, step: int | None) -> Iterator[None]:
    """Log the failed save of a step and go on; the error was agreed on, so all ranks have it."""
    try:
        yield
    except StorageError as error:
        if job.topology.rank == 0:
            log.error("the checkpoint of step %d was not saved, the run goes on: %s", step, error)
        job.telemetry.log({"event": "checkpoint_failed", "step": step, "reason": str(error)})
        if job.guard is not None and job.guard.state.green_step == step:
            # the one before is still the newest to go back to
            job.guard.state = replace(job.guard.state, green_step=job.saver.kept)


def tell_begin(job: Job, way: Way) -> None:
    """Log that a save begins."""
    if job.topology.rank == 0:
        size = job.saver.expected_bytes() / 1e9
        log.info("checkpoint of step %d begun: %.3g GB, %s", job.progress.step, size, TOLD[way])


def log_checkpoint(job: Job, done: Published) -> None:
    """Log a save; training stood still for `blocked_seconds` of its `seconds`."""
    if job.topology.rank == 0:
        linked = ""
        if done.linked_bytes:
            linked = f" ({done.linked_bytes / 1e9:.3g} GB of it linked)"
        log.info(
            "checkpoint of step %d finished: %.3g GB%s in %.1f s, training stood still for %.1f s",
            done.step,
            done.num_bytes / 1e9,
            linked,
            done.seconds,
            done.blocked_seconds,
        )
    event = {
        "event": "checkpoint",
        "step": done.step,
        "path": done.folder.name,
        "seconds": done.seconds,
        "blocked_seconds": done.blocked_seconds,
        "update_wait_seconds": done.update_wait_seconds,
        "bytes": done.num_bytes,
        "linked_bytes": done.linked_bytes,
        "asynchronous": done.asynchronous,
        "way": done.way,
    }
    job.telemetry.log(event)
    if job.report is not None:
        job.report.refresh()
