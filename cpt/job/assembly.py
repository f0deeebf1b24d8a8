"""Build everything that the training loop needs, in the order in which it can fail cheaply.

data (built by the first rank if it is missing and small) -> engine -> checkpoint or weights
    -> guard, telemetry -> Job
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState
from cpt.checkpoint.lineage import lineage_of_run
from cpt.checkpoint.loading import LoadedState, load_checkpoint
from cpt.checkpoint.saver import Saver
from cpt.guard.generation.yardstick import Generation
from cpt.guard.guard import Guard
from cpt.guard.held_out_text import HeldOutText
from cpt.guard.replay_share import ReplayShares
from cpt.guard.traces.yardstick import OwnTraces
from cpt.guard.yardstick import Yardstick
from cpt.job.context import RunContext
from cpt.job.data import check_plan, open_data, open_kl_targets, plan_of
from cpt.job.engine_setup import (
    base_of,
    build_engine,
    fill_weights,
    stored_weights,
    verify_checksums,
    weight_source,
)
from cpt.job.job import Job, start_from_loaded
from cpt.job.kept_config import keep_config
from cpt.job.resume_order import note_carried_out
from cpt.job.resumption import (
    StartingPoint,
    expected_checkpoint,
    fresh_start,
    refuse_other_adapter,
    refuse_other_base,
    start_from,
)
from cpt.job.seam import Seam
from cpt.parallel.agreement import on_first_rank, together
from cpt.resilience.agreed_stop import leave_if_asked
from cpt.resilience.best_effort import best_effort
from cpt.resilience.faults import fault_point, install_faults
from cpt.telemetry.metrics import Telemetry
from cpt.telemetry.report.periodic import PeriodicReport
from cpt.telemetry.trackers import trackers_for
from cpt.training.engine import TrainingEngine
from cpt.training.original_router import watch_drift
from cpt.training.stability import Stability
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.epochs import with_weights
from data_pipeline.mixture.stages import mixture_of

log = logging.getLogger("cpt.job.assembly")


def assemble(context: RunContext) -> Job:
    """Build a run and restore its newest checkpoint.

    Raises:
        CptError: on all ranks, with the exit code of the run.
    """
    config, group = context.config, context.control_group
    data = open_data(context)
    context = replace(context, mix=with_weights(context.mix, data.manifest))
    on_first_rank(group, lambda: check_expected_plan(context, data))
    kl_targets = open_kl_targets(config, data, context.topology)
    leave_if_asked(context.stop, group, "before the model was loaded")
    source = weight_source(config, context.model_config, context.topology)
    engine = build_engine(config, context.model_config, context.topology, context.clock)
    install_faults(engine.deepspeed, context.clock)
    leave_if_asked(context.stop, group, "before the checkpoint was loaded")
    fault_point("load", 0)
    adapter = adapter_of_run(context)
    loaded = load_newest(context, engine)
    if loaded is not None:
        refuse_other_adapter(
            loaded.state,
            loaded.folder.name,
            config.adapter,
            context.model_config,
            config.train.dtype,
        )
        if adapter is not None:
            refuse_other_base(loaded.state, loaded.folder.name, adapter.base)
    guard = make_guard(context, data)
    begins = loaded is None or loaded.state.begins_a_run
    if begins or adapter is not None:  # no checkpoint holds what lies below an adapter
        if begins and guard is not None:
            keep_baseline_model(context, engine, guard)
        if config.model.verify_checksums:
            verify_checksums(source, context.topology)
        fill_weights(engine, source, below_adapter=not begins)
    if loaded is not None and begins:  # what was imported takes the place of the first values
        loaded = load_newest(context, engine)
        assert loaded is not None
    if config.telemetry.router_interval_steps:
        watch_drift(engine, context.run_dir, untouched=begins)
    start = beginning(context, data, loaded)
    job = Job(
        context=context,
        data=data,
        kl_targets=kl_targets,
        ledger=start.ledger,
        stages=start.stages,
        mixture=mixture_of(data, start.ledger, context.mix.seed, start.stages),
        engine=engine,
        guard=guard,
        replay=ReplayShares(
            context.mix, data, config.guard.max_replay_share, config.guard.least_replay
        ),
        saver=Saver(context.run_dir, engine.deepspeed, context.topology, config.checkpoint),
        telemetry=open_telemetry(context),
        progress=start.progress,
        stability=Stability(),
        report=periodic_report(context),
        adapter=adapter,
        lineage=on_first_rank(group, lambda: lineage_of_run(config)),
        starting_model=starting_model(context, None if begins else loaded),
    )
    if loaded is not None:
        job.restore(loaded, accept_mix_change=config.data.accept_mix_change)
        log.info("resuming from %s", loaded.folder)
        if not begins:
            tell_seam(context, loaded)
    return job


def adapter_of_run(context: RunContext) -> AdapterState | None:
    """Return what checkpoints of this run tell of its adapter; None without one.

    Raises:
        ConfigError: on all ranks: the base cannot be read.
    """
    config = context.config
    if not config.adapter.is_on:
        return None
    base = on_first_rank(
        context.control_group, lambda: asdict(base_of(config, context.model_config))
    )
    return AdapterState(section=config.adapter, base=AdapterBase(**base), dtype=config.train.dtype)


def starting_model(context: RunContext, loaded: LoadedState | None) -> Mapping[str, Any] | None:
    """Return what the model is known by that the run has its first weights from.

    A run that goes on keeps what its beginning has found: the files may have changed or gone since.

    Args:
        context: The start of the run.
        loaded: The checkpoint that the run goes on from; None if it begins.

    Raises:
        ConfigError: on all ranks: the model cannot be read.
    """
    if loaded is not None:
        return loaded.state.starting_model
    config = context.config
    if config.model.path is None or config.adapter.is_on:
        return None

    def look() -> dict[str, Any]:
        base = base_of(config, context.model_config)
        return {"hash": base.hash, "sums": base.sums}

    return on_first_rank(context.control_group, look)


def beginning(context: RunContext, data: BuiltData, loaded: LoadedState | None) -> StartingPoint:
    """Return where the run begins or goes on.

    A run that goes on keeps the phases and stages that it was begun with. Those that a new run of
    its length would have may not even exist.

    Raises:
        CptError: see `fresh_start` and `start_from_loaded`.
    """
    config = context.config
    if loaded is None:
        return fresh_start(context.mix, data, config)
    return start_from_loaded(context, data, loaded, accept_mix_change=config.data.accept_mix_change)


def periodic_report(context: RunContext) -> PeriodicReport | None:
    """Return what draws the page of a run while it goes on; None on ranks that do not."""
    if context.topology.rank != 0 or context.observe:
        return None
    return PeriodicReport(context.run_dir, context.config.telemetry.report_interval_seconds)


def tell_seam(context: RunContext, loaded: LoadedState) -> None:
    """Log what has changed since a checkpoint, and check it once more.

    The gate has looked at the newest checkpoint, which may be damaged: this is the one in use.

    Raises:
        ConfigError: the schedule was changed since the checkpoint, and that is not accepted.
    """
    seam = Seam.of(loaded.state, loaded.folder.name, loaded.step, context.config)
    if not context.observe:
        seam.check()
    if context.topology.rank == 0:
        log.info("%s", seam.describe())


def check_expected_plan(context: RunContext, data: BuiltData) -> None:
    """Log the warnings of the data plan; check the plan of a mix that was built after the gate.

    Raises:
        DataError: the data cannot feed the run.
        ConfigError: the checkpoint to go on from has trained on rows that are others now.
    """
    plan = context.plan
    if plan is None:
        checkpoint = expected_checkpoint(context.run_dir, context.resume)
        if checkpoint is None:
            start = fresh_start(context.mix, data, context.config)
        else:
            start = start_from(
                checkpoint,
                context.run_dir,
                context.config,
                context.model_config,
                context.mix,
                data,
            )
        plan = plan_of(context.config, data, context.mix, start)
        check_plan(context.config, plan)
    for warning in plan.warnings:
        log.warning("data plan: %s", warning)


def load_newest(context: RunContext, engine: TrainingEngine) -> LoadedState | None:
    """Load the checkpoint to go on from into the engine; None at the beginning of a run.

    Raises:
        CheckpointError: on all ranks: none is sound, or it belongs to another model.
    """
    run_dir, resume = context.run_dir, context.resume
    if resume == "never":
        return None
    loaded = load_checkpoint(
        run_dir,
        engine.deepspeed,
        context.topology,
        resume,
        set_aside=not context.observe,
    )
    if resume != "auto" and not context.observe:
        on_first_rank(context.control_group, lambda: note_carried_out(run_dir, resume))
    return loaded


def keep_baseline_model(context: RunContext, engine: TrainingEngine, guard: Guard) -> None:
    """Measure the model of `guard.baseline_model`, if the run names one, with the run's engine.

    The engine holds its weights afterwards.

    Raises:
        RequeueRequested: on all ranks: a stop was asked for meanwhile.
        ConfigError, CheckpointError: on all ranks: the model cannot be read.
    """
    path = context.config.guard.baseline_model
    if path is None:
        return
    source = stored_weights(path, context.model_config, context.topology)
    if context.config.model.verify_checksums:
        verify_checksums(source, context.topology)
    fill_weights(engine, source)
    context.clock.enter("evaluate", 0)
    is_kept = guard.keep_untouched(engine, context.stop)
    if not is_kept:
        leave_if_asked(context.stop, context.control_group, "before the first step")
    log.info("guard: %s is the model that this run is compared with", path)


def make_guard(context: RunContext, data: BuiltData) -> Guard | None:
    """Return the guard, or None if it is switched off or the mix has nothing to measure."""
    config, topology, run_dir = context.config, context.topology, context.run_dir
    if not config.guard.enabled:
        return None
    yardsticks: list[Yardstick] = []
    if data.held_out:
        yardsticks.append(HeldOutText(data, config, topology, run_dir, observe=context.observe))
    if context.mix.guard.generation:
        yardsticks.append(
            Generation(
                context.mix, config, topology, run_dir, context.clock, observe=context.observe
            )
        )
    if context.mix.guard.traces:
        yardsticks.append(OwnTraces(context.mix, config, topology, run_dir, context.clock))
    if not yardsticks:
        return None
    return Guard(yardsticks, config, topology, run_dir)


def open_telemetry(context: RunContext) -> Telemetry:
    """Open metrics and trackers on the first rank, and keep the configuration of this start there.

    Raises:
        CptError: on all ranks, if the first rank could not open them.
    """

    def open_on_first() -> Telemetry:
        if context.observe or context.topology.rank != 0:
            return Telemetry(None)
        with best_effort("The configuration of this start is not kept"):
            keep_config(context.run_dir, context.config)
        trackers = trackers_for(context.config, context.run_dir)
        return Telemetry(context.run_dir / "metrics.jsonl", trackers)

    return together(context.control_group, open_on_first)
