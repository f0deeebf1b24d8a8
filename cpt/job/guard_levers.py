"""The guard's levers: what a decision of the ladder does to the run.

    raise_replay   a new segment of the mix ledger from the next batch on
    lower_lr       `GuardState.lr_scale`, a factor on the schedule
    pause          save and leave with exit code 75 and the reason
    rollback       at the next start: load the last green checkpoint and mix with more replay from there

Every rank comes to the same decision, because it sees reduced values only.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import NoReturn

from cpt.checkpoint.loading import load_checkpoint
from cpt.checkpoint.reader import list_steps
from cpt.config import GuardSection
from cpt.errors import ConfigError, RequeueRequested
from cpt.guard.guard import Guard
from cpt.guard.ladder import (
    Decision,
    Evidence,
    GuardState,
    ReplayLimits,
    after_pause,
    evidence_of,
)
from cpt.job.job import Job
from cpt.job.progress import batch_of_step, read_guard_rollbacks, write_guard_rollbacks
from cpt.job.saving import end, final_save
from cpt.parallel.agreement import on_first_rank

log = logging.getLogger("cpt.guard")


def replay_limits(job: Job) -> ReplayLimits:
    """What replay may still do for the held-out domains of the run."""
    assert job.guard is not None
    raised, replay, train = job.guard.state.shares, job.replay, job.config.train
    last_batch = batch_of_step(train.total_steps - 1, job.progress.skip_ranges)
    batch, batch_size = job.progress.next_batch, train.global_batch_size
    left = max(0, last_batch + 1 - batch)
    return ReplayLimits(
        shares={
            name: (
                replay.share(name, raised),
                replay.largest_share(name, raised, job.mixture, batch, left, batch_size),
            )
            for name in job.guard.domain_names
        },
        room=replay.room(raised),
    )


def steer(job: Job, guard: Guard, decision: Decision) -> None:
    """Do what was decided after a measurement.

    Raises:
        RequeueRequested: the run is paused, after saving.
    """
    if decision.action == "pause":
        pause(job, decision.reason)
    state, taken = guard.state, set(decision.actions.values())
    if "raise_replay" in taken or "lower_lr" in taken:
        job.reweigh(job.replay.weights(state.shares))
        if job.topology.rank == 0:
            log.warning("from step %d on: replay %s; learning rate %g of the schedule's", job.progress.step + 1,
                        shares_for_people(state.shares), state.lr_scale)  # fmt: skip


def pause(job: Job, reason: str) -> NoReturn:
    """Save and leave; the next start goes back to the last green checkpoint.

    Raises:
        RequeueRequested: with the reason.
    """
    final_save(job)
    end(job)
    raise RequeueRequested(
        f"paused by the guard after step {job.progress.step}: {reason}. Saved. Starting again goes on from the last "
        "checkpoint at which every domain was green, with more replay; look at report.html first."
    )


def note_green(job: Job) -> None:
    """Remember a checkpoint that is about to be saved as one to go back to, and keep it from being
    deleted.
    """
    if job.guard is None:
        return
    state = job.guard.state
    if state.green and not state.paused and job.progress.step:
        job.guard.state = state = dataclasses.replace(state, green_step=job.progress.step)
    if state.green_step is not None:
        job.saver.keep(state.green_step)


def go_on_after_pause(job: Job) -> None:
    """At the start of a run that was paused: back to the last green checkpoint, with more replay.

    Raises:
        ConfigError: `guard.max_rollbacks` is used up; the run must not be queued again.
    """
    guard = job.guard
    if guard is None or not guard.state.paused:
        return
    started, paused, from_step = time.perf_counter(), guard.state, job.progress.step
    settings, group = job.config.guard, job.topology.control_group
    if paused.rollbacks >= settings.max_rollbacks:
        raise ConfigError(
            f"the guard paused this run at step {from_step}: {paused.paused}. It has gone on after a pause "
            f"{paused.rollbacks} times (guard.max_rollbacks). Raise the tolerance (guard.tolerance_percent, "
            "guard.domains), give the mix more replay, lower train.lr, or allow more with --set guard.max_rollbacks."
        )
    job.clock.enter("rollback", from_step)
    back = paused.green_step
    there = (
        on_first_rank(group, lambda: back in list_steps(job.run_dir)) if back is not None else False
    )
    limits = replay_limits(job)
    state = after_pause(
        paused, suffering(paused, settings, limits), settings, replay_room=limits.room
    )
    states = on_first_rank(group, lambda: read_guard_rollbacks(job.run_dir))
    on_first_rank(group, lambda: write_guard_rollbacks(job.run_dir, [*states, state.to_json()]))
    if there:
        loaded = load_checkpoint(job.run_dir, job.engine.deepspeed, job.topology, str(back))
        assert loaded is not None
        # an edit of the mix was accepted when this run started
        job.restore(loaded, accept_mix_change=True)
    guard.state = state
    job.reweigh(job.replay.weights(state.shares))
    event = {
        "event": "guard_rollback",
        "step": job.progress.step,
        "from_step": from_step,
        "reason": paused.paused,
    }
    job.telemetry.log({**event, "after": state.to_json(), "seconds": time.perf_counter() - started})
    if job.topology.rank == 0:
        where = (
            f"back from step {from_step} to {back}"
            if there
            else f"on from step {from_step}: no green checkpoint"
        )
        log.warning(
            "after the guard's pause %s; replay now: %s", where, shares_for_people(state.shares)
        )


def suffering(paused: GuardState, settings: GuardSection, limits: ReplayLimits) -> list[Evidence]:
    """The domains that were over their line when the run paused."""
    return [
        evidence_of(name, None, settings, limits) for name in paused.over if name in limits.shares
    ]


def shares_for_people(shares: Mapping[str, float]) -> str:
    """Raised shares as percent."""
    return (
        ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        or "as in the mix"
    )
