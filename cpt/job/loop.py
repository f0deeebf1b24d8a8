"""The training loop: load, step, log, measure, save.  It knows no model and no layout."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any, NoReturn

from cpt.errors import EXIT_DONE
from cpt.job.guard_levers import (
    go_on_after_pause,
    lever_limits,
    note_green,
    set_levers,
    steer,
)
from cpt.job.job import Job
from cpt.job.memory_report import report_memory
from cpt.job.progress import forget_guard_pause
from cpt.job.recovery import after_step
from cpt.job.samples import show_continuations
from cpt.job.saving import end, final_save, leave, periodic_save, publish
from cpt.job.stage_switch import change_stage
from cpt.job.step_event import count_slots, step_event, tokens_by_source
from cpt.job.step_lines import StepLines
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.agreed_stop import leave_if_asked
from cpt.resilience.best_effort import best_effort
from cpt.resilience.faults import fault_point
from cpt.resilience.stop import StopRequest
from cpt.telemetry.goodput import start_event
from cpt.telemetry.router import mean_overlap, router_event
from cpt.telemetry.run_end import has_last_look
from cpt.training.engine import StepResult, Votes
from cpt.training.garbage_collection import collecting
from cpt.training.schedule import learning_rate
from data_pipeline.console.progress import ProgressBar, show_progress
from data_pipeline.mixture.mixture import GlobalBatch

log = logging.getLogger("cpt.job.loop")

LEAST_WAIT = 0.01
"""Share of a step from which on its wait for data or for a save is logged; less counts as
productive.
"""


def train(job: Job) -> bool:
    """Train from `job.progress` to the planned end.

    Returns:
        Whether there was anything to do: False if the planned end had been reached before.

    Raises:
        RequeueRequested: stopped on request, or paused by the guard, after saving.
        ConfigError: the guard could not measure, because what it kept of the untouched model is
            missing or of another model.
    """
    settings, progress = job.config.train, job.progress
    last_step = job.last_step
    if job.guard is not None and 0 < progress.step < last_step:
        job.guard.open_untouched(progress.step)
    go_on_after_pause(job)
    if progress.step >= last_step > 0:
        is_measured = job.guard is None or is_last_look_done(job)
        if not is_measured:  # the run was killed after its last save
            measure(job, last=True)
        if not is_measured or job.context.ending.has_failed_before:
            end(job, EXIT_DONE, f"finished: step {progress.step} of {last_step}")
        return False
    if job.next_stage != job.config.stage:  # the checkpoint that was found is of another stage
        change_stage(job)
    begin(job, last_step)
    # the second step after a start is the first whose memory is that of all others
    reported_step = progress.step + 2 if job.config.telemetry.memory_report else None
    lines = step_lines(job, last_step)
    with (
        closing(job.reader),
        collecting(settings.gc_interval_steps) as collect,
        progress_bar(job, last_step) as bar,
    ):
        while progress.step < last_step:
            batch = job.next_global_batch()
            result, event = do_step(job, batch, reports_memory=progress.step + 1 == reported_step)
            tell_step(job, event, lines, bar)
            went_back = after_step(job, batch, result)
            collect(progress.step)
            bar.update(progress.step - bar.n)  # a rollback takes steps back
            publish(job, settled_ranks=result.votes.save_settled)
            if is_due(progress.step, job.config.telemetry.sample_interval_steps):
                show_continuations(job)
            if progress.step == last_step:
                break  # the end of the run answers a request to stop, too
            if result.votes.stop:
                leave(job)
            if job.next_stage != job.config.stage:
                finish_stage(job, went_back=went_back)
            if not went_back:
                do_due_work(job)
            elif owes_look(job) and not measure(job, job.stop):
                leave(job)
    job.stop.consume()
    final_save(job)
    if progress.step > 0:
        measure(job, last=True)
    end(job, EXIT_DONE, f"finished: step {progress.step} of {last_step}")
    return True


def is_last_look_done(job: Job) -> bool:
    """Return whether the guard measured the weights of the end; one that cannot tell did not."""

    def look() -> bool:
        is_done = False
        with best_effort("The last look of the guard is made again"):
            is_done = has_last_look(job.telemetry.events(), job.progress.step)
        return is_done

    return on_first_rank(job.topology.control_group, look)


def begin(job: Job, last_step: int) -> None:
    """Log the start, and measure what has to be measured before the first step.

    Raises:
        RequeueRequested: a stop was asked for meanwhile.
    """
    step = job.progress.step
    fault_point("before_first_step", step)
    job.telemetry.log(start_event(step, job.telemetry.previous_end))
    if job.topology.rank == 0:
        with best_effort("The note of a pause that was answered stays"):
            forget_guard_pause(job.run_dir)
    if step < last_step and job.guard is not None and job.guard.is_owed(step):
        measure(job, job.stop)
    leave_if_asked(job.stop, job.topology.control_group, "before the first step")
    job.has_begun = True
    if step == 0:
        job.engine.rounding.publish(step)


def progress_bar(job: Job, last_step: int) -> ProgressBar:
    """Return the bar of the first rank, if there is a terminal; `step_lines` are for all others."""
    return show_progress(
        last_step,
        "training",
        "step",
        initial=job.progress.step,
        hidden=job.topology.rank != 0,
        lines=False,
    )


def step_lines(job: Job, last_step: int) -> StepLines:
    """Return what writes the lines of the log about steps."""
    return StepLines(
        first_step=job.progress.step,
        last_step=last_step,
        interval_steps=job.config.telemetry.log_interval_steps if job.topology.rank == 0 else 0,
        memory_kind="GPU" if job.topology.device.type == "cuda" else "RSS",
        goodput=job.telemetry.goodput_share,
    )


def tell_step(job: Job, event: dict[str, Any], lines: StepLines, bar: ProgressBar) -> None:
    """Show people a step that was done."""
    lines.take(event)
    bar.set_postfix_str(f"loss {event['loss']:.3f}, {event['tokens_per_second']:.0f} tokens/s")


def do_step(
    job: Job, batch: GlobalBatch, *, reports_memory: bool
) -> tuple[StepResult, dict[str, Any]]:
    """Do one optimizer step, count it in `job.progress`, and log it.

    Returns:
        The step, and its line of metrics.jsonl.
    """
    started = time.perf_counter()
    progress = job.progress
    step = progress.step + 1
    lr = learning_rate(progress.step, job.config.train, job.config.lr_factors)
    if job.guard is not None:
        lr *= job.guard.state.lr_scale
    set_levers(job, lr)

    def votes() -> Votes:
        settled = job.saver.own_part_is_settled()
        return Votes(stop=job.stop.requested(), save_settled=settled)

    with report_memory(job.config, job.engine, job.mailbox, step, due=reports_memory):
        result = job.engine.step(
            job.micro_batches(batch),
            tokens_by_source(batch, job),
            step=step,
            votes=votes,
            measure_routers=is_due(step, job.config.telemetry.router_interval_steps),
            loss_weights=job.loss_weights,
        )
    progress.step = step
    progress.tokens += sum(result.tokens_by_source)
    progress.batch_chain = batch.chain_hash(progress.batch_chain)
    seconds = time.perf_counter() - started
    event = step_event(job, result, lr, seconds, count_slots(batch, job))
    phase = job.ledger.segment_at(batch.step).phase
    if phase:
        event["phase"] = phase
    job.telemetry.log(event)
    log_waits(job, event["seconds"])
    if result.router is not None:
        routers = router_event(step, result.router, job.data.languages)
        job.router_overlap = mean_overlap(routers)
        job.telemetry.log(routers)
    return result, event


def do_due_work(job: Job) -> None:
    """Measure and save, if it is time.

    Raises:
        RequeueRequested: a stop was asked for meanwhile, or the guard paused the run.
    """
    step = job.progress.step
    if is_due(step, job.config.guard.interval_steps) and not measure(job, job.stop):
        leave(job)
    # a checkpoint between skipped updates would hold nothing new, and a rollback would find it
    is_sound = not job.stability.skipped_in_a_row
    if is_due(step, job.config.checkpoint.interval_steps) and is_sound:
        note_green(job)
        periodic_save(job)


def owes_look(job: Job) -> bool:
    """Return whether a run that has gone back to a step has to look at the model there.

    The step was measured and saved when it was done, unless a stop cut off its look. Then the
    checkpoint does not know of the look that the next start made.
    """
    step = job.progress.step
    return step > 0 and job.guard is not None and job.guard.is_owed(step)


def finish_stage(job: Job, *, went_back: bool) -> NoReturn:
    """Do what is due after the last step of a stage, save, and leave for the next one.

    Args:
        job: The run, whose next batch is of another stage.
        went_back: The run has just gone back to a checkpoint, so there is nothing to save.

    Raises:
        StageFinished: saved.
        RequeueRequested: a stop was asked for meanwhile, or the guard paused the run.
        StorageError: it could not be saved.
    """
    if not went_back:
        if is_due(job.progress.step, job.config.guard.interval_steps) and not measure(
            job, job.stop
        ):
            leave(job)
        note_green(job)
        final_save(job)
    change_stage(job)


def measure(job: Job, stop: StopRequest | None = None, *, last: bool = False) -> bool:
    """Score the held-out text and do what follows from it.

    Args:
        job: The run.
        stop: Looked at between domains.
        last: The run is over, so nothing follows but warnings.

    Returns:
        False if a stop was asked for before all domains were scored.

    Raises:
        RequeueRequested: the guard paused the run.
    """
    if job.guard is None:
        return True
    started = time.perf_counter()
    step = job.progress.step
    job.clock.enter("evaluate", step)
    replay = None if last else lambda: lever_limits(job)
    decision = job.guard.measure(step, job.engine, job.telemetry, stop=stop, replay=replay)
    seconds = time.perf_counter() - started
    job.telemetry.log({"event": "evaluation", "step": step, "seconds": seconds})
    if decision is not None and job.topology.rank == 0:
        verdict = job.guard.verdict()
        if step == 0 and job.config.guard.baseline_model is None:
            verdict = "the untouched model is measured"
        log.info("guard at step %d: %s; %.1f s", step, verdict, seconds)
    if decision is not None and not last:
        steer(job, job.guard, decision)
    return decision is not None


def log_waits(job: Job, step_seconds: float) -> None:
    """Log the events of other threads, and the waits of a step that are worth a line."""
    for event in job.mailbox.collect():
        job.telemetry.log(event)
    step = job.progress.step
    for_data = job.take_data_wait()
    if for_data >= LEAST_WAIT * step_seconds:
        job.telemetry.log({"event": "data_wait", "step": step, "seconds": for_data})
    for_save = job.engine.take_save_wait()
    if for_save >= LEAST_WAIT * step_seconds:
        job.telemetry.log({"event": "save_wait", "step": step, "seconds": for_save})


def is_due(step: int, interval_steps: int) -> bool:
    """Return whether work of every `interval_steps` steps is due; 0 means never."""
    return interval_steps > 0 and step % interval_steps == 0
