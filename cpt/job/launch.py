"""From command-line options to a finished run: pass the gate, then build, train and tell."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from cpt.checkpoint.reader import step_folder
from cpt.config import RunConfig
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.errors import ConfigError, RequeueRequested, StageFinished
from cpt.export.run_export import ExportForm, export_run
from cpt.job.assembly import assemble
from cpt.job.context import RunContext
from cpt.job.ending import Ending
from cpt.job.gate import pass_gate
from cpt.job.job import Job
from cpt.job.log_files import log_to_file
from cpt.job.loop import train
from cpt.job.network import look_at_network
from cpt.job.passed_gate import PassedGate
from cpt.job.run_dir import held_run_dir, stored_numels
from cpt.job.run_report import draw_report_of_leaving
from cpt.job.samples import print_continuations
from cpt.job.stage_switch import agree_on_stage, start_again
from cpt.job.summary import describe, describe_data, describe_memory
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.resilience.best_effort import best_effort
from cpt.resilience.devices import this_device
from cpt.resilience.followed_work import followed_by_all
from cpt.resilience.job_secret import take_job_secret
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest, watch_launcher
from cpt.resilience.watchdog import watching
from cpt.telemetry.mailbox import EventMailbox
from cpt.telemetry.run_end import finish_time
from data_pipeline.console.say import say
from data_pipeline.store.files import AtChunk

log = logging.getLogger("cpt.job.launch")

FAILED_CLOSE_SECONDS = 10.0
"""Longest wait for a tracker of a run that failed: the other ranks learn of the failure after it.
"""
STOPPED_CLOSE_SECONDS = 10.0
"""Longest wait for a tracker of a run that was stopped: its job may be about to end."""


def launch(options: argparse.Namespace, stop: StopRequest) -> None:
    """Do one run.

    Args:
        options: The command line.
        stop: Requests to stop since the process was started.

    Raises:
        CptError: with the exit code of the run.
    """
    passed = pass_gate(options)
    secret = take_job_secret()
    if options.dry_run:
        dry_run(passed)
        return
    device = this_device(passed.environment, passed.config.train.threads)
    init_distributed(device)
    passed = agree_on_stage(passed)
    topology = create_topology(
        sp_size=passed.config.sp_size, ep_size=passed.config.ep_size, device=device
    )
    together(topology.control_group, passed.refuse)
    # each rank has looked by itself whether an earlier start has carried out --resume
    resume = on_first_rank(topology.control_group, lambda: passed.resume)
    passed = replace(passed, resume=resume)
    check_same_everywhere(passed.config, topology)
    try:
        run(options, passed, topology, stop, secret)
    except StageFinished as finished:
        start_again(stop, secret, finished)
    dist.destroy_process_group()


def dry_run(passed: PassedGate) -> None:
    """Print what a run would do, then refuse what it would refuse.

    Raises:
        CptError: see `cpt.job.gate.pass_gate`.
    """
    if passed.environment.rank == 0:
        say(describe(passed))
        if passed.seam is not None:
            say(passed.seam.describe())
        say(describe_memory(passed))
        if passed.refusal is None or passed.plan is not None:
            say(describe_data(passed), flush=True)
    passed.refuse()


def run(
    options: argparse.Namespace,
    passed: PassedGate,
    topology: Topology,
    stop: StopRequest,
    secret: bytes | None,
) -> None:
    """Train, or only look at the weights of a run, as the command line asks.

    Args:
        options: The command line.
        passed: The configuration.
        topology: The layout.
        stop: Requests to stop.
        secret: The secret of the job from the environment; None if it has none.
    """
    config = passed.config
    watch_launcher(stop, config.checkpoint.stop_budget_seconds)
    observe = bool(options.sample or options.measure)
    ending = Ending(passed.run_dir, topology, observe=observe)
    context = RunContext(
        config=config,
        model_config=passed.model_config,
        mix=passed.mix,
        run_dir=passed.run_dir,
        resume=passed.resume,
        plan=passed.plan,
        observe=observe,
        topology=topology,
        clock=PhaseClock(),
        mailbox=EventMailbox(),
        stop=stop,
        ending=ending,
    )
    held = nullcontext() if context.observe else hold(context)
    watched = watching(
        context.run_dir,
        topology,
        config.watchdog,
        context.clock,
        context.mailbox.post,
        ending.record_ruling,
        secret=secret,
    )
    with held, ending.recording(), watched:
        if not context.observe:
            log_to_file(context.run_dir, topology.rank)
            if topology.rank == 0:
                stop.watch_run(context.run_dir, config.checkpoint.stop_margin_seconds)
        if topology.rank == 0:
            log.info("%s", describe(passed))
        if options.resume != context.resume:
            log.info("--resume %s was carried out by an earlier start of this job", options.resume)
        network = None
        if not context.observe:
            network = look_at_network(context, passed.environment.local_rank)
        job = assemble(context)
        ending.progress = job.progress
        try:
            if network is not None:
                job.telemetry.log({**network, "step": job.progress.step})
            if options.sample:
                print_continuations(job, options.sample)
            if options.measure:
                measure_once(job)
            if not context.observe:
                has_trained = train(job)
                finish(job, has_trained=has_trained)
        except Exception as error:
            ending.show(job.telemetry, error)
            if not isinstance(error, RequeueRequested):
                job.telemetry.close(FAILED_CLOSE_SECONDS)
            elif not context.observe:
                close_together(job)
            raise
        finally:
            job.telemetry.close()
            if job.report is not None:
                job.report.close()


def close_together(job: Job) -> None:
    """Close the trackers of the first rank while all ranks wait, because training was stopped.

    A launcher ends the first rank's helper processes as soon as another rank has left.  All ranks
    call this, since they agree on a stop.  A rank that is gone already changes nothing: whatever
    there was to save is saved.
    """
    with contextlib.suppress(Exception):
        on_first_rank(
            job.topology.control_group, lambda: job.telemetry.close(STOPPED_CLOSE_SECONDS)
        )


def hold(context: RunContext) -> AbstractContextManager[None]:
    """Hold the run directory of a run; see `held_run_dir`."""
    numels = stored_numels(context.config, context.model_config)
    return held_run_dir(context.run_dir, context.resume, context.config, numels, context.topology)


def measure_once(job: Job) -> None:
    """Score the held-out text with the weights of a run, and leave the run as it is.

    Raises:
        ConfigError: the mix holds nothing out, or the untouched model was never measured.
    """
    if job.guard is None:
        raise ConfigError(
            "--measure: nothing is held out (held_out_share in the mix), or guard.enabled is false."
        )
    job.clock.enter("evaluate", job.progress.step)
    file = job.guard.measure_apart(job.progress.step, job.engine)
    if job.topology.rank == 0:
        say(f"\nweights after step {job.progress.step}\n{job.guard.table()}\n-> {file}")


def check_same_everywhere(config: RunConfig, topology: Topology) -> None:
    """Refuse to run on nodes that read other files or found another layout.

    Raises:
        ConfigError: the resolved configuration of some rank differs from that of the first.
    """
    plain = json.dumps(config.to_plain(), sort_keys=True)
    digest = hashlib.sha256(plain.encode()).hexdigest()
    digests = gather_json(digest, topology.control_group)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise ConfigError(
            f"ranks {different} resolved another configuration than rank 0. Give every node the "
            "same files and the same number of ranks, or write sizes instead of 'auto' in the "
            "DeepSpeed JSON."
        )


def finish(job: Job, *, has_trained: bool) -> None:
    """Draw the report, export if asked, and tell people where everything is.

    Args:
        job: The run.
        has_trained: This start has done steps, and not found the run finished.
    """
    run_dir = job.run_dir
    last = step_folder(run_dir, job.progress.step)
    places = {"metrics": run_dir / "metrics.jsonl", "checkpoint": last}
    job.clock.enter("export", job.progress.step)
    report = draw_report_of_leaving(job, "finished")
    if report is not None:
        places["report"] = report
    if job.config.telemetry.export_at_end:
        out = run_dir / "export" / last.name
        places["export"] = out
        if export_at_end(job, last, out):
            event = {"event": "export", "step": job.progress.step}
            job.telemetry.log({**event, "path": str(out.relative_to(run_dir))})
    if job.topology.rank != 0:
        return
    if job.guard is not None and job.guard.latest:
        log.info("the last measurement of the guard\n%s", job.guard.table())
    lines = [f"done: {job.progress.step} steps, {job.progress.tokens} tokens"]
    if not has_trained:
        lines.insert(0, finished_before(job))
    for name, path in places.items():
        lines.append(f"  {name:<12}{path}")
    log.info("%s", "\n".join(lines))


def finished_before(job: Job) -> str:
    """Return what to say of a run that had reached its planned end before this start."""
    ended_at = None
    with best_effort("This start does not tell when the run was finished"):
        ended_at = finish_time(job.telemetry.events())
    when = ""
    if ended_at is not None:
        when = f" on {time.strftime('%Y-%m-%d at %H:%M:%S %Z', time.localtime(ended_at))}"
    key = "total_steps" if job.config.train.stop_at_step is None else "stop_at_step"
    return (
        f"this run was finished before{when}: step {job.progress.step} of {job.last_step}. Nothing "
        f"was trained. For more steps raise train.{key}."
    )


def format_at_end(config: RunConfig, step: int) -> str:
    """Return the form in which the model that was trained is exported after a step.

    With rounded experts that is MXFP4: in bf16 they would be the master weights, which no forward
    pass has used.
    """
    if config.adapter.is_on:
        return "peft"
    return "mxfp4" if config.train.quantize.is_on_after(step) else "bf16"


def export_at_end(job: Job, checkpoint: Path, out: Path) -> bool:
    """Export the last checkpoint, and return True, unless that was done before."""
    group = job.topology.control_group
    if on_first_rank(group, out.exists):
        return False
    started = time.perf_counter()
    if job.topology.rank == 0:
        log.info("export of %s begun", checkpoint.name)
    form = ExportForm(format_name=format_at_end(job.config, job.progress.step))

    def write(at_chunk: AtChunk) -> None:
        export_run(job.run_dir, checkpoint, out, form, at_chunk=at_chunk)

    followed_by_all(group, job.clock, job.progress.step, write)
    if job.topology.rank == 0:
        log.info("export finished in %.1f s: %s", time.perf_counter() - started, out)
    return True
