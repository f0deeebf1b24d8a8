"""Handle steps that are not sound: log them, skip their update, or roll back.

Every rank comes to the same decision, because it judges reduced values only
(`cpt.training.stability`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from cpt.checkpoint.given_up_batches import batch_of_step, read_rollbacks
from cpt.checkpoint.loading import load_checkpoint
from cpt.checkpoint.reader import list_steps
from cpt.errors import InternalError
from cpt.job.job import Job
from cpt.job.progress import Progress, write_rollbacks
from cpt.job.saving import publish
from cpt.parallel.agreement import on_first_rank
from cpt.training.engine import StepResult
from cpt.training.stability import ROLLBACK_AFTER, SpikeLimits
from data_pipeline.mixture.mixture import GlobalBatch

log = logging.getLogger("cpt.job.recovery")

MOST_NAMED_ROWS = 16
"""Rows that a warning names; metrics.jsonl has all of them."""


def after_step(job: Job, batch: GlobalBatch, result: StepResult) -> bool:
    """Judge the step that `job.progress` has just counted; log one that is not sound.

    Returns:
        Whether the run went back to a checkpoint.

    Raises:
        InternalError: `ROLLBACK_AFTER` updates in a row were skipped, and the run cannot or may not
            roll back.
    """
    limits = job.stability.limits()
    outcome = job.stability.assess(result.loss, result.grad_norm, applied=result.applied)
    job.progress.updates += result.applied
    if outcome == "sound":
        return False
    rows = row_ids(job, batch)
    event: dict[str, Any] = {"step": job.progress.step, "loss": result.loss}
    event["grad_norm"] = result.grad_norm
    event["rows"] = rows
    if outcome == "spike":
        event = {"event": "spike", **event, "loss_limit": limits.loss}
        event["grad_norm_limit"] = limits.grad_norm
        told = describe_spike(job, result, limits, rows)
    else:
        event = {"event": "skipped_update", **event, "in_a_row": job.stability.skipped_in_a_row}
        event["total"] = job.stability.skipped_total
        told = describe_skip(job, result, rows)
    job.telemetry.log(event)
    if job.topology.rank == 0:
        log.warning("%s", told)
    if outcome != "rollback":
        return False
    roll_back(job)
    return True


def row_ids(job: Job, batch: GlobalBatch) -> list[str]:
    """Return the rows of a global batch as `source:row`."""
    names = job.data.source_names
    pairs = zip(batch.sources.tolist(), batch.rows.tolist(), strict=True)
    return [f"{names[source]}:{row}" for source, row in pairs]


def describe_spike(job: Job, result: StepResult, limits: SpikeLimits, rows: list[str]) -> str:
    """Return one line for people about a spike."""
    return (
        f"spike at {_values(job, result)} (limits {limits.loss:.4g} and {limits.grad_norm:.4g}); "
        f"rows {_first(rows)}"
    )


def describe_skip(job: Job, result: StepResult, rows: list[str]) -> str:
    """Return one line for people about an update that was skipped."""
    in_a_row, total = job.stability.skipped_in_a_row, job.stability.skipped_total
    return (
        f"not finite at {_values(job, result)}; the update was skipped on all ranks ({in_a_row} in "
        f"a row, {total} in all); rows {_first(rows)}"
    )


def _values(job: Job, result: StepResult) -> str:
    return f"step {job.progress.step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"


def _first(rows: list[str]) -> str:
    named = ", ".join(rows[:MOST_NAMED_ROWS])
    left = len(rows) - MOST_NAMED_ROWS
    return f"{named} and {left} more in metrics.jsonl" if left > 0 else named


def roll_back(job: Job) -> None:
    """Load the newest sound checkpoint and give up the batches of the updates just skipped.

    Raises:
        InternalError: on all ranks: there is no checkpoint, or `train.max_rollbacks` is used up.
        CheckpointError: no checkpoint is sound.
    """
    job.clock.enter("save", job.progress.step)
    publish(job)  # the save in flight may be the newest sound one
    started = time.perf_counter()
    progress, group = job.progress, job.topology.control_group
    from_step = progress.step
    first_step = from_step - job.stability.skipped_in_a_row
    first_batch = batch_of_step(first_step, progress.skip_ranges)
    last_batch = batch_of_step(from_step - 1, progress.skip_ranges) + 1
    rollbacks = on_first_rank(group, lambda: read_rollbacks(job.run_dir))
    job.clock.enter("rollback", from_step)
    check_rollback(job, len(rollbacks), first_step)
    loaded = load_checkpoint(job.run_dir, job.engine.deepspeed, job.topology, "auto")
    assert loaded is not None
    saved = Progress()
    if not loaded.state.begins_a_run:
        saved = Progress.from_json(loaded.state.part("progress", loaded.folder.name))
    # a checkpoint of the streak itself has consumed some of its batches already
    given_up = (max(first_batch, saved.next_batch), last_batch)
    # the mix of this run was accepted when it started
    job.restore(loaded, accept_mix_change=True, given_up=(given_up,))
    record = {"from_step": from_step, "to_step": progress.step}
    record |= {"first_batch": given_up[0], "last_batch": given_up[1]}
    on_first_rank(group, lambda: write_rollbacks(job.run_dir, [*rollbacks, record]))
    seconds = time.perf_counter() - started
    job.telemetry.log({"event": "rollback", "step": progress.step, **record, "seconds": seconds})
    if job.topology.rank == 0:
        log.warning(
            "rolled back from step %d to %s; batches %d to %d are given up.",
            from_step,
            loaded.folder.name,
            given_up[0],
            given_up[1] - 1,
        )


def check_rollback(job: Job, num_rollbacks: int, first_step: int) -> None:
    """Refuse a rollback that is one too many, or has nowhere to go.

    Raises:
        InternalError: on all ranks.
    """
    cause = (
        f"{ROLLBACK_AFTER} updates in a row were not finite (steps {first_step + 1} to "
        f"{job.progress.step})"
    )
    has_checkpoint = on_first_rank(
        job.topology.control_group, lambda: bool(list_steps(job.run_dir))
    )
    cure = advice(job, has_checkpoint=has_checkpoint)
    if num_rollbacks >= job.config.train.max_rollbacks:
        raise InternalError(
            f"{cause}, and the run has rolled back {num_rollbacks} times already "
            f"(train.max_rollbacks). {cure}"
        )
    if not has_checkpoint:
        raise InternalError(f"{cause}, and there is no checkpoint to roll back to. {cure}")


def advice(job: Job, *, has_checkpoint: bool) -> str:
    """Return what to do when updates cannot be applied."""
    if job.progress.updates == 0:
        model = job.config.model
        weights = f"model.path {model.path}" if model.path else f"model.init {model.init}"
        return (
            f"No update of this run was ever applied, so look at its first weights ({weights}): "
            "compare their SHA-256 with the published ones. If they are sound, look at the rows "
            "named above and lower train.lr."
        )
    rows = "Look at the rows named above and lower train.lr"
    return f"{rows}; the newest checkpoint is intact." if has_checkpoint else f"{rows}."
