"""The training loop: load, step, log, measure, save.  It knows no model and no layout."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from typing import Any

import numpy as np
from tqdm import tqdm

from cpt.job.guard_levers import go_on_after_pause, note_green, replay_limits, steer
from cpt.job.job import Job
from cpt.job.memory_report import report_memory
from cpt.job.recovery import after_step
from cpt.job.samples import show_continuations
from cpt.job.saving import end, final_save, leave, periodic_save, publish
from cpt.resilience.agreed_stop import leave_if_asked
from cpt.resilience.faults import fault_point
from cpt.resilience.stop import StopRequest
from cpt.telemetry.goodput import start_event
from cpt.telemetry.router import router_event
from cpt.training.engine import StepResult, Votes
from cpt.training.garbage_collection import collecting
from cpt.training.schedule import learning_rate
from data_pipeline.mixture.mixture import GlobalBatch

log = logging.getLogger("cpt.job.loop")

LEAST_DATA_WAIT = 0.01
"""Share of a step from which on its wait for data is logged; below, it counts as productive."""


def train(job: Job) -> None:
    """Train from `job.progress` to the planned end.

    Raises:
        RequeueRequested: stopped on request, after saving.
    """
    settings, progress = job.config.train, job.progress
    last_step = settings.stop_at_step if settings.stop_at_step is not None else settings.total_steps
    go_on_after_pause(job)
    if progress.step >= last_step > 0:
        return
    fault_point("before_first_step", progress.step)
    job.telemetry.log(start_event(progress.step, job.telemetry.previous_end))
    if progress.step == 0 < last_step:
        measure(job, job.stop)
    leave_if_asked(job.stop, job.topology.control_group, "before the first step")
    bar = tqdm(total=last_step, initial=progress.step, unit="step", disable=job.topology.rank != 0)
    started_at = progress.step
    with collecting(settings.gc_interval_steps) as collect, bar:
        while progress.step < last_step:
            started = time.perf_counter()
            batch = job.mixture.global_batch(progress.next_batch, settings.global_batch_size)
            lr = learning_rate(progress.step, settings) * (
                job.guard.state.lr_scale if job.guard else 1.0
            )
            job.engine.set_learning_rate(lr)
            second = progress.step == started_at + 1 and job.config.telemetry.memory_report
            with report_memory(job.config, job.engine, job.mailbox, progress.step + 1, due=second):
                result = job.engine.step(
                    job.micro_batches(batch),
                    tokens_by_source(batch, job),
                    step=progress.step + 1,
                    votes=lambda: Votes(
                        stop=job.stop.requested(), save_settled=job.saver.own_part_is_settled()
                    ),
                    measure_routers=is_due(
                        progress.step + 1, job.config.telemetry.router_interval_steps
                    ),
                )
            progress.step += 1
            progress.tokens += sum(result.tokens_by_source)
            progress.batch_chain = batch.chain_hash(progress.batch_chain)
            event = step_event(job, result, lr, time.perf_counter() - started)
            job.telemetry.log(event)
            log_waits(job, event["seconds"])
            if result.router is not None:
                job.telemetry.log(router_event(progress.step, result.router, job.data.languages))
            went_back = after_step(job, batch, result)
            collect(progress.step)
            bar.set_postfix_str(
                f"loss {result.loss:.3f}, {event['tokens_per_second']:.0f} tokens/s"
            )
            bar.update(progress.step - bar.n)
            publish(job, settled_ranks=result.votes.save_settled)
            if is_due(progress.step, job.config.telemetry.sample_interval_steps):
                show_continuations(job)
            if progress.step == last_step:
                break  # a request to stop is obeyed by being done
            if result.votes.stop:
                leave(job)
            if went_back:
                continue  # this step was measured and saved when it was done
            if is_due(progress.step, job.config.guard.interval_steps) and not measure(
                job, job.stop
            ):
                leave(job)
            # a checkpoint between skipped updates would hold nothing new, and be what a rollback
            # finds
            if (
                is_due(progress.step, job.config.checkpoint.interval_steps)
                and not job.stability.skipped_in_a_row
            ):
                note_green(job)
                periodic_save(job)
    job.stop.consume()
    final_save(job)
    if progress.step > 0:
        measure(job, last=True)
    end(job)


def measure(job: Job, stop: StopRequest | None = None, *, last: bool = False) -> bool:
    """Watch held-out text and do what follows; False if a request to stop came first.

    Raises:
        RequeueRequested: the guard paused the run.
    """
    if job.guard is None:
        return True
    started = time.perf_counter()
    job.clock.enter("evaluate", job.progress.step)
    replay = None if last else lambda: replay_limits(job)
    decision = job.guard.measure(
        job.progress.step, job.engine, job.telemetry, stop=stop, replay=replay
    )
    seconds = time.perf_counter() - started
    job.telemetry.log({"event": "evaluation", "step": job.progress.step, "seconds": seconds})
    if decision is not None and not last:
        steer(job, job.guard, decision)
    return decision is not None


def log_waits(job: Job, step_seconds: float) -> None:
    """Events beside the step's own: slow ranks, and the wait for data where it was worth a line."""
    for event in job.mailbox.collect():
        job.telemetry.log(event)
    waited = job.take_data_wait()
    if waited >= LEAST_DATA_WAIT * step_seconds:
        job.telemetry.log({"event": "data_wait", "step": job.progress.step, "seconds": waited})


def is_due(step: int, interval_steps: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 means never."""
    return interval_steps > 0 and step % interval_steps == 0


def tokens_by_source(batch: GlobalBatch, job: Job) -> list[int]:
    """Predicted tokens of a global batch per source, known to every rank without asking."""
    counts = np.bincount(
        batch.sources, weights=batch.predicted_tokens, minlength=len(job.data.source_names)
    )
    return [int(count) for count in counts]


def step_event(job: Job, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    tokens = sum(result.tokens_by_source)
    nll_by_language: dict[str, float] = defaultdict(float)
    tokens_by_language: dict[str, int] = defaultdict(int)
    for language, nll, count in zip(
        job.data.languages, result.nll_by_source, result.tokens_by_source, strict=True
    ):
        nll_by_language[language] += nll
        tokens_by_language[language] += count
    names = job.data.source_names
    by_source = list(zip(names, result.nll_by_source, result.tokens_by_source, strict=True))
    event: dict[str, Any] = {
        "event": "step",
        "step": job.progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "loss_by_source": {name: nll / count for name, nll, count in by_source if count},
        "loss_by_language": {
            name: nll_by_language[name] / count
            for name, count in tokens_by_language.items()
            if count
        },
        "tokens_by_source": {name: count for name, _, count in by_source},
        "bytes_sent": result.bytes_sent,
    }
    if job.kl_targets is not None and result.kl_by_source is not None:
        by_source = list(zip(names, result.kl_by_source, result.tokens_by_source, strict=True))
        with_targets = job.kl_targets.sources
        event["kl_by_source"] = {
            name: kl / count for name, kl, count in by_source if count and name in with_targets
        }
    return event
