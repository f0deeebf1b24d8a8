"""What a run does about steps that are not sound: tell, skip, roll back.

Every rank comes to the same decision, because it sees reduced values only
(`cpt.training.stability`).
"""

from __future__ import annotations

import logging
import time

from cpt.checkpoint.loading import load_checkpoint
from cpt.checkpoint.reader import list_steps
from cpt.errors import InternalError
from cpt.job.job import Job
from cpt.job.progress import Progress, batch_of_step, read_rollbacks, write_rollbacks
from cpt.job.saving import publish
from cpt.parallel.agreement import on_first_rank
from cpt.training.engine import StepResult
from cpt.training.stability import ROLLBACK_AFTER, SpikeLimits
from data_pipeline.mixture.mixture import GlobalBatch

log = logging.getLogger("cpt.job.recovery")


def after_step(job: Job, batch: GlobalBatch, result: StepResult) -> bool:
    """Judge the step just counted in `job.progress`; a step that is not sound is logged with its
    row ids.

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
    event = {
        "event": "spike" if outcome == "spike" else "skipped_update",
        "step": job.progress.step,
    }
    values = {"loss": result.loss, "grad_norm": result.grad_norm, "rows": row_ids(job, batch)}
    if outcome == "spike":
        job.telemetry.log(
            {**event, **values, "loss_limit": limits.loss, "grad_norm_limit": limits.grad_norm}
        )
    else:
        counts = {"in_a_row": job.stability.skipped_in_a_row, "total": job.stability.skipped_total}
        job.telemetry.log({**event, **values, **counts})
    if job.topology.rank == 0:
        log.warning("%s", describe(job, batch, result, limits))
    if outcome == "rollback":
        roll_back(job)
    return outcome == "rollback"


def row_ids(job: Job, batch: GlobalBatch) -> list[str]:
    """The rows of a global batch as `source:row`."""
    names = job.data.source_names
    return [
        f"{names[source]}:{row}"
        for source, row in zip(batch.sources.tolist(), batch.rows.tolist(), strict=True)
    ]


def describe(job: Job, batch: GlobalBatch, result: StepResult, limits: SpikeLimits) -> str:
    """One line for people about a step that is not sound."""
    rows = row_ids(job, batch)
    named = ", ".join(rows[:16]) + (
        f" and {len(rows) - 16} more in metrics.jsonl" if len(rows) > 16 else ""
    )
    values = (
        f"step {job.progress.step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
    )
    if result.applied:
        return (
            f"spike at {values} (limits {limits.loss:.4g} and {limits.grad_norm:.4g}); rows {named}"
        )
    counts = f"{job.stability.skipped_in_a_row} in a row, {job.stability.skipped_total} in all"
    return f"not finite at {values}; the update was skipped on all ranks ({counts}); rows {named}"


def roll_back(job: Job) -> None:
    """Load the newest verified checkpoint and give up the batches whose updates were skipped in a
    row.

    Raises:
        InternalError: on all ranks: there is no checkpoint, or `train.max_rollbacks` is used up.
        CheckpointError: no checkpoint is sound.
    """
    publish(job)  # the save in flight may be the newest sound one
    started, progress, group = time.perf_counter(), job.progress, job.topology.control_group
    from_step, first_step = progress.step, progress.step - job.stability.skipped_in_a_row
    first_batch = batch_of_step(first_step, progress.skip_ranges)
    last_batch = batch_of_step(from_step - 1, progress.skip_ranges) + 1
    rollbacks = on_first_rank(group, lambda: read_rollbacks(job.run_dir))
    cause = (
        f"{ROLLBACK_AFTER} updates in a row were not finite (steps {first_step + 1} to {from_step})"
    )
    advice = "Look at the rows named above and lower train.lr; the newest checkpoint is intact."
    if len(rollbacks) >= job.config.train.max_rollbacks:
        raise InternalError(
            f"{cause}, and the run has rolled back {len(rollbacks)} times already (train.max_rollbacks). {advice}"
        )
    job.clock.enter("rollback", from_step)
    if not on_first_rank(group, lambda: list_steps(job.run_dir)):
        raise InternalError(f"{cause}, and there is no checkpoint to roll back to. {advice}")
    loaded = load_checkpoint(job.run_dir, job.engine.deepspeed, job.topology, "auto")
    assert loaded is not None
    saved = Progress.from_json(loaded.state["progress"])
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
        log.warning("rolled back from step %d to %s; batches %d to %d are given up.", from_step, loaded.folder.name,
                    given_up[0], given_up[1] - 1)  # fmt: skip
