"""The guard's levers: how a decision changes the run.

    raise_replay, lower_replay   one more segment of the mix ledger, from the next batch on, and as
                                 many points of share more or less in every phase to come
    lower_lr, raise_lr           `GuardState.lr_scale`, a factor on the schedule
    raise_kl, lower_kl           `GuardState.kl_weight`, in place of `train.kl_weight`
    freeze_routers               rate 0 for the routers from the next step on
    pause                        save and leave with exit code 75 and the reason
    rollback                     at the next start: load the last green checkpoint, more replay

Every rank comes to the same decision, because it sees reduced values only.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import NoReturn

from cpt.checkpoint.loading import load_checkpoint, set_newer_aside
from cpt.checkpoint.reader import list_steps
from cpt.config import GuardSection
from cpt.errors import ConfigError, RequeueRequested
from cpt.guard.decision import after_pause
from cpt.guard.guard import Guard
from cpt.guard.ladder import LEVERS, RELIEFS, Decision, GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.requirements import acts
from cpt.guard.yardstick import Evidence, Reading
from cpt.job.job import Job
from cpt.job.progress import read_guard_rollbacks, write_guard_pause, write_guard_rollbacks
from cpt.job.run_report import draw_report_together
from cpt.job.saving import end, final_save
from cpt.job.stretches import capped_phases, later_stages
from cpt.parallel.agreement import on_first_rank

log = logging.getLogger("cpt.job.guard_levers")


def lever_limits(job: Job) -> LeverLimits:
    """Return how far the guard's levers can still move at the present step."""
    assert job.guard is not None
    train = job.config.train
    batch = job.progress.next_batch
    last_batch = job.last_batch
    mean_shares = None
    if job.ledger.has_phases and last_batch >= batch:
        mean_shares = job.ledger.mean_weights(batch, last_batch + 1)
    limits = job.present_replay().limits(
        job.guard.state,
        job.guard.domain_names,
        job.mixture,
        batch,
        batches_left=max(0, last_batch + 1 - batch),
        batch_size=train.global_batch_size,
        mean_shares=mean_shares,
        stretches=[*later_stages(job), *capped_phases(job)],
    )
    return replace(
        limits,
        is_warming_up=job.progress.step < train.warmup_steps,
        kl_weight=train.kl_weight,
        router_overlap=job.router_overlap,
    )


def set_levers(job: Job, lr: float) -> None:
    """Give the engine what the guard's levers are set to, for the next step.

    Args:
        job: The run.
        lr: Learning rate of that step, the guard's factor included.
    """
    are_frozen = False
    if job.guard is not None and job.config.guard.router_lever == "freeze":
        are_frozen = job.guard.state.routers_frozen
    job.engine.set_learning_rate(lr, routers_frozen=are_frozen)
    job.engine.set_kl_weight(job.kl_weight)


def steer(job: Job, guard: Guard, decision: Decision) -> None:
    """Pull the levers that were decided on after a measurement.

    The learning rate, the weight of the divergence and the freezing of routers are read from the
    guard's state before each step (`set_levers`).

    Raises:
        RequeueRequested: the run is paused, after saving.
    """
    if decision.action == "pause":
        pause(job, decision.reason)
    if not set(decision.actions.values()) & {*LEVERS, *RELIEFS}:
        return
    job.reweigh(guard.state)
    if job.topology.rank == 0:
        log.info("from step %d on: %s", job.progress.step + 1, describe_levers(job, guard.state))


def pause(job: Job, reason: str) -> NoReturn:
    """Save and leave; the next start goes back to the last green checkpoint.

    The state is noted by itself as well: if this step was saved before it was measured, its
    checkpoint is complete and does not know of the pause.

    Raises:
        RequeueRequested: with the reason.
    """
    assert job.guard is not None
    step, state = job.progress.step, job.guard.state.to_json()
    on_first_rank(job.topology.control_group, lambda: write_guard_pause(job.run_dir, step, state))
    final_save(job)
    paused = RequeueRequested(
        f"paused by the guard after step {job.progress.step}: {reason}. Saved. Starting again goes "
        "on from the last checkpoint at which every domain was green, with more replay; look at "
        "report.html first."
    )
    end(job, paused.exit_code, str(paused))
    draw_report_together(job, "paused", reason)
    raise paused


def note_green(job: Job) -> None:
    """Remember a checkpoint that is about to be saved as one to go back to.

    A guard that does not act never goes back, so nothing is kept from deletion for it.
    """
    if job.guard is None or not acts(job.config.guard):
        return
    state = job.guard.state
    if state.green and not state.paused and job.progress.step:
        job.guard.state = replace(state, green_step=job.progress.step)


def go_on_after_pause(job: Job) -> None:
    """Go back to the last green checkpoint, with more replay, if the guard paused the run.

    Raises:
        ConfigError: `guard.max_rollbacks` is used up; the run must not be queued again.
    """
    guard = job.guard
    if guard is None or not guard.state.paused:
        return
    if job.config.guard.policy != "act":
        overrule_pause(job, guard)
        return
    started = time.perf_counter()
    paused = guard.state
    from_step = job.progress.step
    check_rollbacks_left(job, paused)
    job.clock.enter("rollback", from_step)
    group = job.topology.control_group
    saved_steps = on_first_rank(group, lambda: list_steps(job.run_dir))
    limits = lever_limits(job)
    suffering = suffering_domains(paused, job.config.guard, limits)
    after = after_pause(paused, suffering, job.config.guard, limits)
    saved = None
    if paused.green_step is not None and paused.green_step in saved_steps:
        saved = load_green(job, paused.green_step)
    guard.return_to(job.progress.step, after, saved)
    state = guard.state
    keep_rollback(job, state)
    job.reweigh(state)
    event = {"event": "guard_rollback", "step": job.progress.step, "from_step": from_step}
    event |= {"reason": paused.paused, "after": state.to_json()}
    job.telemetry.log({**event, "seconds": time.perf_counter() - started})
    if job.topology.rank == 0:
        where = f"on from step {from_step}: no green checkpoint"
        if saved is not None:
            where = f"back from step {from_step} to {paused.green_step}"
        log.warning("after the guard's pause %s; replay: %s", where, describe_shares(state))


def overrule_pause(job: Job, guard: Guard) -> None:
    """Go on where the guard paused the run, because it is told to do no more than warn."""
    reason = guard.state.paused
    guard.state = replace(guard.state, paused="")
    step = job.progress.step
    event = {"event": "guard_restored", "step": step, "after": guard.state.to_json()}
    job.telemetry.log(event)
    if job.topology.rank == 0:
        log.warning(
            "the guard paused this run at step %d: %s. guard.policy is %s, so the run goes on from "
            "there, with the replay and the learning rate that the guard had set.",
            step,
            reason,
            job.config.guard.policy,
        )


def check_rollbacks_left(job: Job, paused: GuardState) -> None:
    """Refuse to go on after the last pause that is allowed.

    Raises:
        ConfigError: with the reason of the pause, and what could be changed.
    """
    if paused.rollbacks < job.config.guard.max_rollbacks:
        return
    raise ConfigError(
        f"the guard paused this run at step {job.progress.step}: {paused.paused}. It has gone on "
        f"after a pause {paused.rollbacks} times (guard.max_rollbacks). Raise the tolerance "
        "(guard.tolerance_percent, guard.domains), give the mix more replay, lower train.lr, allow "
        "more with --set guard.max_rollbacks, or let the guard only tell: --set guard.policy=warn."
    )


def load_green(job: Job, step: int) -> GuardState:
    """Load the checkpoint of a step at which every domain was green.

    The checkpoint of the pause stays the newest one until the rollback is noted, so that a start
    after a kill in between goes back again.

    Returns:
        The state of the guard that was saved with it.
    """
    loaded = load_checkpoint(
        job.run_dir, job.engine.deepspeed, job.topology, str(step), set_aside=False
    )
    assert loaded is not None
    # an edit of the mix was accepted when this run started
    job.restore(loaded, accept_mix_change=True)
    return GuardState.from_json(loaded.state.guard)


def keep_rollback(job: Job, state: GuardState) -> None:
    """Note the state after a rollback, then set the checkpoints of the steps gone back over aside.

    A rollback that is repeated after a kill takes the place of its first try.
    """

    def keep() -> None:
        states = read_guard_rollbacks(job.run_dir)[: state.rollbacks - 1]
        write_guard_rollbacks(job.run_dir, [*states, state.to_json()])
        set_newer_aside(job.run_dir, job.progress.step, str(job.progress.step))

    on_first_rank(job.topology.control_group, keep)


def suffering_domains(
    paused: GuardState, settings: GuardSection, limits: LeverLimits
) -> list[Evidence]:
    """Return the evidence of the domains that were over their line when the run paused.

    No bound of theirs is known any more, which counts as above every limit.
    """
    evidence = []
    for name in paused.over:
        tolerance, hard_limit = settings.limits(name)
        reading = Reading(domain=name, lower_bound=None, tolerance=tolerance, hard_limit=hard_limit)
        if name in paused.readings:
            reading = replace(Reading.from_json(paused.readings[name]), lower_bound=None)
        if name in limits.shares:
            evidence.append(Evidence.of(reading, reading.step, *limits.shares[name]))
    return evidence


def describe_levers(job: Job, state: GuardState) -> str:
    """Return what the levers are set to, for people."""
    parts = [
        f"replay {describe_shares(state)}",
        f"learning rate {state.lr_scale:g} of the schedule's",
    ]
    if state.kl_weight is not None:
        parts.append(f"weight of the divergence {job.kl_weight:.3g}")
    if state.routers_frozen:
        parts.append("routers frozen")
    return "; ".join(parts)


def describe_shares(state: GuardState) -> str:
    """Return the shares that the guard gave to domains or sources in percent, for people."""
    shares = {**state.replay, **state.shares}
    if not shares:
        return "as in the mix"
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
