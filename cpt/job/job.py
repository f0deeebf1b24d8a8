"""A validated configuration -> everything the training loop needs, in the order in which it can
fail cheaply.

data (built by rank 0 if missing and small) -> mix ledger -> model -> engine -> checkpoint -> guard,
telemetry
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GptOssConfig

from cpt.checkpoint.loading import LoadedState, flat_ranges, load_checkpoint
from cpt.checkpoint.saver import Saver
from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.deepspeed_adapter.partition import materialise_partitioned
from cpt.deepspeed_adapter.shards import publish_master_weights, set_optimizer_step
from cpt.errors import ConfigError
from cpt.guard.guard import Guard
from cpt.guard.ladder import GuardState
from cpt.guard.replay_share import ReplayShares
from cpt.job.data import check_mix, check_plan, open_data, open_kl_targets
from cpt.job.progress import (
    Progress,
    Ranges,
    merged,
    newest_guard_state,
    read_guard_rollbacks,
    read_rollbacks,
    skipped_by,
)
from cpt.model import attention, gpt_oss
from cpt.model.attention import Attention
from cpt.model.attention.probe import run_probe
from cpt.model.freezing import freeze
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import damaged, known_sums, share
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import WeightSource, fill_parts
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology
from cpt.parallel.ulysses import Ulysses
from cpt.resilience.agreed_stop import leave_if_asked
from cpt.resilience.faults import fault_point, install_faults
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest
from cpt.telemetry.mailbox import EventMailbox
from cpt.telemetry.metrics import Telemetry
from cpt.telemetry.trackers import trackers_for
from cpt.training.engine import TrainingEngine
from cpt.training.kl_targets import KLTargets
from cpt.training.loader import MicroBatch, load_micro_batch
from cpt.training.original_router import watch_drift
from cpt.training.stability import Stability
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger, resume_ledger, same_weights
from data_pipeline.mixture.mixture import GlobalBatch, Mixture
from data_pipeline.store.files import write_text

log = logging.getLogger("cpt.job.job")


@dataclass(kw_only=True)
class Job:
    """One run, ready to train; `ledger` and `mixture` are replaced when the guard raises replay or
    a run goes back.
    """

    config: RunConfig
    run_dir: Path
    topology: Topology
    clock: PhaseClock
    mailbox: EventMailbox
    data: BuiltData
    kl_targets: KLTargets | None
    """The base model's distributions for rows of some sources; None if the run does not ask for
    them.
    """
    mix: MixConfig
    """The data mix as the user wrote it; what the guard raised is in the ledger."""
    ledger: Ledger
    mixture: Mixture
    engine: TrainingEngine
    guard: Guard | None
    replay: ReplayShares
    saver: Saver
    telemetry: Telemetry
    stop: StopRequest
    progress: Progress
    stability: Stability
    identity: dict[str, Any]
    """What may not change when the run is resumed."""
    model_config: dict[str, Any]
    """Hugging Face configuration, for export."""
    data_wait_seconds: float = 0.0
    """Time that this rank has spent reading rows since the last `take_data_wait`."""

    def micro_batches(self, batch: GlobalBatch) -> Iterator[MicroBatch]:
        """This rank's forward passes of one global batch."""
        for micro_step in range(self.config.gradient_accumulation_steps):
            self.clock.enter("data", self.progress.step + 1)
            started = time.perf_counter()
            fault_point("data", self.progress.step + 1)
            size = self.config.micro_batch_size
            loaded = load_micro_batch(
                self.data, batch, micro_step, size, self.topology, self.kl_targets
            )
            self.data_wait_seconds += time.perf_counter() - started
            yield loaded

    def take_data_wait(self) -> float:
        """Return the seconds spent reading rows since the last call."""
        taken = self.data_wait_seconds
        self.data_wait_seconds = 0.0
        return taken

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Mix with these weights from the next batch on: one more segment of the ledger, if they
        are others.
        """
        if not same_weights(self.ledger.segments[-1].weights, weights):
            self.ledger = self.ledger.reweigh(self.progress.next_batch, weights)
            self.mixture = Mixture(self.data, self.ledger, self.mix.seed)

    def restore(self, loaded: LoadedState, skip_ranges: Ranges, *, accept_mix_change: bool) -> None:
        """Go on from a checkpoint whose tensors were just loaded, without the batches of
        `skip_ranges`.

        Raises:
            ConfigError: the mix is another than the checkpoint's, and `accept_mix_change` is false.
        """
        saved, plain, group = (
            Progress.from_json(loaded.state["progress"]),
            loaded.state,
            self.topology.control_group,
        )
        self.saver.trust(loaded.step)
        self.progress.restore(saved, skip_ranges)
        self.stability.restore(plain.get("stability"))
        self.engine.router_watch.restore(plain.get("router_load"))
        set_optimizer_step(self.engine.deepspeed, saved.updates)
        rows, batch = self.data.manifest.row_hashes(), self.progress.next_batch
        self.ledger = resume_ledger(
            plain["ledger"], self.mix, batch, accept_change=accept_mix_change, rows=rows
        )
        self.mixture = Mixture(self.data, self.ledger, self.mix.seed)
        if self.guard is not None:
            states = on_first_rank(group, lambda: read_guard_rollbacks(self.run_dir))
            self.guard.state = GuardState.from_json(newest_guard_state(plain.get("guard"), states))
            self.reweigh(self.replay.weights(self.guard.state.shares))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {
            "guard": self.guard.state.to_json() if self.guard is not None else None,
            "progress": self.progress.to_json(),
            "stability": self.stability.to_json(),
            "router_load": self.engine.router_watch.state(),
            "identity": self.identity,
            "ledger": self.ledger.to_json(),
            "model_config": self.model_config,
            "config": self.config.to_plain(),
        }


def build_engine(
    config: RunConfig, model_config: GptOssConfig, topology: Topology, clock: PhaseClock
) -> TrainingEngine:
    """Skeleton, patch, engine, with no values yet: see `fill_weights`.

    The attention backend is chosen here and refuses what it cannot do.
    """
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    try:
        kernel = attention.choose(
            config.model.attention,
            device=topology.device,
            dtype=dtype,
            head_dim=model_config.head_dim,
        )
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from error
    exchange = make_exchange(config, window_tokens(model_config), topology)
    probe_attention(kernel, exchange, dtype, model_config, topology)
    model = gpt_oss.skeleton(model_config, dtype)
    report = gpt_oss.patch(model, topology)
    if config.zero_stage == 3:
        materialise_partitioned(model, config.engine_json, dtype)
        gpt_oss.restore_rotary_frequencies(model, topology.device)
    else:
        gpt_oss.materialise(model, topology.device)
    log.info("patched: %s", report)
    if config.train.freeze:
        log.info(
            "frozen: %d tensors (%s)",
            freeze(model, config.train.freeze),
            ", ".join(config.train.freeze),
        )
    return TrainingEngine(model, config, topology, kernel, exchange, clock)


def fill_weights(engine: TrainingEngine, source: WeightSource) -> None:
    """Give the engine its first weights: every rank reads or draws its own part, in fp32 where the
    source has it.

    Raises:
        StorageError: on all ranks, if one could not read.
    """
    topology, master = engine.topology, "master/"
    targets = {
        key.removeprefix(master): (part.tensor, part.offset)
        for key, part in flat_ranges(engine.deepspeed, topology).items()
        if key.startswith(master)
    }
    together(topology.control_group, lambda: fill_parts(targets, source))
    publish_master_weights(engine.deepspeed)


def verify_checksums(source: WeightSource, topology: Topology) -> None:
    """Hash the weight files, each on one rank, and refuse damaged ones.

    Raises:
        ConfigError: on all ranks, naming every file whose SHA-256 is not the known one.
    """
    if not isinstance(source, DirectoryWeights):
        return
    group = topology.control_group
    sums = together(group, lambda: known_sums(source.path, source.files))
    if not sums:
        log.info("weights: no SHA256SUMS in %s, files are read as they are", source.path)
        return
    mine = share({file: file.stat().st_size for file in sums}, topology.rank, topology.world_size)
    problems = gather_json(together(group, lambda: damaged(sums, mine)), group)
    if any(problems):
        raise ConfigError([problem for rank in problems for problem in rank])
    log.info("weights: SHA-256 of %d files of %d verified", len(sums), len(source.files))


def weight_source(
    config: RunConfig, model_config: GptOssConfig, topology: Topology
) -> WeightSource:
    """Where the first weights come from; a directory is compared with the model here, before memory
    is taken.

    Raises:
        ConfigError: the directory does not hold this model.
    """
    path = config.model.path
    if path is None:
        return RandomWeights(config.train.seed, float(model_config.initializer_range))
    shapes = parameter_shapes(model_config)
    return together(topology.control_group, lambda: DirectoryWeights(path, shapes))


def make_exchange(config: RunConfig, window: int, topology: Topology) -> Ulysses | None:
    """How ranks that share a row exchange around attention; None if none do."""
    if topology.sp_size == 1:
        return None
    return Ulysses(topology, WindowHalo(topology, window) if config.use_halo else None)


def probe_attention(
    kernel: Attention,
    exchange: Ulysses | None,
    dtype: torch.dtype,
    model_config: GptOssConfig,
    topology: Topology,
) -> None:
    """Compare the attention of this run, exchange included, with its definition; see
    `cpt.model.attention.probe`.

    Raises:
        ConfigError: on all ranks, if it is wrong on any.
    """
    run = partial(
        run_probe,
        kernel,
        device=topology.device,
        dtype=dtype,
        head_dim=model_config.head_dim,
        num_query_heads=model_config.num_attention_heads,
        num_kv_heads=model_config.num_key_value_heads,
        window=window_tokens(model_config),
        sequence_parallel=exchange,
        sp_size=topology.sp_size,
        sp_rank=topology.sp_rank,
    )
    report = together(topology.control_group, run)
    topology.traffic.take()
    log.info(
        "attention agrees with its definition: largest relative error %.1e", report.largest_error
    )


def assemble(
    config: RunConfig,
    model_config: GptOssConfig,
    topology: Topology,
    clock: PhaseClock,
    mailbox: EventMailbox,
    run_dir: Path,
    resume: str,
    stop: StopRequest,
    *,
    observe: bool = False,
) -> Job:
    """Build everything and restore the newest checkpoint.

    Args:
        config: The validated configuration.
        model_config: The model's configuration.
        topology: The layout.
        clock: Keeps the phase of this rank.
        mailbox: Collects events for metrics.jsonl.
        run_dir: Exists already.
        resume: `auto`, `never` or a step.
        stop: Where stop requests arrive.
        observe: Nothing in the run directory is changed: another job may be at work there.
    """
    mix = check_mix(config)
    data = open_data(config, mix, topology)
    kl_targets = open_kl_targets(config, data, topology)
    leave_if_asked(stop, topology.control_group, "before the model was loaded")
    source = weight_source(config, model_config, topology)
    engine = build_engine(config, model_config, topology, clock)
    install_faults(engine.deepspeed, clock)
    leave_if_asked(stop, topology.control_group, "before the checkpoint was loaded")
    identity = {
        "seed": config.train.seed,
        "seq_len": config.train.seq_len,
        "global_batch_size": config.train.global_batch_size,
    }
    fault_point("load", 0)
    loaded = (
        None
        if resume == "never"
        else load_checkpoint(run_dir, engine.deepspeed, topology, resume, set_aside=not observe)
    )
    if loaded is None:
        if config.model.verify_checksums:
            verify_checksums(source, topology)
        fill_weights(engine, source)
    else:
        check_identity(loaded, identity)
    if config.telemetry.router_interval_steps:
        watch_drift(engine, run_dir, untouched=loaded is None)
    ledger = Ledger.start(mix, data.manifest.row_hashes())
    job = Job(
        config=config,
        run_dir=run_dir,
        topology=topology,
        clock=clock,
        mailbox=mailbox,
        data=data,
        kl_targets=kl_targets,
        mix=mix,
        ledger=ledger,
        mixture=Mixture(data, ledger, mix.seed),
        engine=engine,
        guard=Guard(data, config, topology, run_dir)
        if config.guard.enabled and data.held_out
        else None,
        replay=ReplayShares(mix, data, config.guard.max_replay_share),
        saver=Saver(run_dir, engine.deepspeed, topology, config.checkpoint),
        telemetry=Telemetry(None),
        stop=stop,
        progress=Progress(),
        stability=Stability(),
        identity=identity,
        model_config=model_config.to_dict(),
    )
    if loaded is not None:
        rollbacks = on_first_rank(topology.control_group, lambda: read_rollbacks(run_dir))
        given_up = [
            *Progress.from_json(loaded.state["progress"]).skip_ranges,
            *skipped_by(rollbacks),
        ]
        job.restore(loaded, merged(given_up), accept_mix_change=config.data.accept_mix_change)
    on_first_rank(
        topology.control_group, lambda: check_plan(config, data, mix, job.ledger, job.progress)
    )
    if not observe:
        job.telemetry = together(
            topology.control_group, lambda: open_telemetry(config, run_dir, topology)
        )
    return job


def open_telemetry(config: RunConfig, run_dir: Path, topology: Topology) -> Telemetry:
    """Metrics and trackers on rank 0, nothing elsewhere; leaves config.resolved.yaml."""
    if topology.rank != 0:
        return Telemetry(None)
    text = yaml.safe_dump(config.to_plain(), sort_keys=False)
    write_text(run_dir / "config.resolved.yaml", text)
    return Telemetry(run_dir / "metrics.jsonl", trackers_for(config, run_dir))


def check_identity(loaded: LoadedState, identity: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint if the run is no longer the same.

    Raises:
        ConfigError: naming every value that differs.
    """
    saved = loaded.state["identity"]
    changed = [
        f"{loaded.folder.name} was trained with {key} {saved.get(key)}, now it is {value}."
        for key, value in identity.items()
        if saved.get(key) != value
    ]
    if changed:
        advice = "Change it back, or start another run with a new --run_dir."
        raise ConfigError([*changed, advice])
    log.info("resuming from %s", loaded.folder)
