"""Find where a run goes on: the parts of a checkpoint that decide which rows come next.

The gate reads them from the newest manifest before weights are read; `cpt.job.job.Job.restore`
reads them again from the checkpoint whose tensors were loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import (
    AdapterBase,
    AdapterState,
    no_adapter_problem,
    whole_model_problem,
)
from cpt.checkpoint.given_up_batches import batch_of_step, merged, read_rollbacks, skipped_by
from cpt.checkpoint.manifest import TensorRecord, fp32_records, read_manifest
from cpt.checkpoint.reader import (
    candidates,
    check_same_tensors,
    first_sound,
    refusal_unread,
    step_folder,
)
from cpt.checkpoint.run_state import RunState
from cpt.config import RunConfig
from cpt.config.adapter_section import AdapterSection
from cpt.errors import ConfigError
from cpt.job.progress import Progress
from cpt.model.adapters.layout import adapter_shapes
from cpt.model.parameters import parameter_shapes
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger, resume_ledger
from data_pipeline.mixture.stages import StagePlan, plan_stages


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """The settings that may not change when a run is resumed."""

    seed: int
    seq_len: int
    """Tokens of a packed row, in the first of several stages."""
    global_batch_size: int
    """Packed rows of one optimizer step, in the first of several stages."""

    @classmethod
    def of(cls, config: RunConfig) -> RunIdentity:
        """Return the identity of a run."""
        rows = config.train.global_batch_size
        if config.stages:
            rows = config.stages[0].global_batch_size or rows
        return cls(seed=config.train.seed, seq_len=config.measured_seq_len, global_batch_size=rows)

    def to_json(self, stages: StagePlan | None) -> dict[str, Any]:
        """Return the identity, and where the stages of the run begin, as JSON values."""
        plain: dict[str, Any] = asdict(self)
        if stages is not None:
            plain["stages"] = stages.to_json()
        return plain

    def problems(self, state: RunState, checkpoint: str) -> list[str]:
        """Return every value that differs from that of a checkpoint, and the advice.

        Raises:
            CheckpointError: the checkpoint does not tell its identity.
        """
        saved = state.part("identity", checkpoint)
        problems = []
        for name, value in asdict(self).items():
            if saved.get(name) != value:
                problems.append(
                    f"{checkpoint} was trained with {name} {saved.get(name)}, now it is {value}."
                )
        if problems:
            problems.append("Change it back, or start another run with a new --run_dir.")
        return problems


def planned_stages(config: RunConfig, mix: MixConfig) -> StagePlan | None:
    """Return where the stages of a new run begin; None for a run without stages.

    Raises:
        ConfigError: a stage has no step.
    """
    if not config.stages:
        return None
    sizes = [stage.global_batch_size or 1 for stage in config.stages]
    return plan_stages(mix.stages, sizes, config.train.total_steps)


def stored_stages(state: RunState, checkpoint: str, config: RunConfig) -> StagePlan | None:
    """Return where the stages of a run begin that goes on from a checkpoint, as it was planned.

    Raises:
        ConfigError: the run has other stages now.
        CheckpointError: the checkpoint does not tell its identity.
    """
    saved = state.part("identity", checkpoint).get("stages")
    plan = None if saved is None else StagePlan.from_json(saved)
    before = []
    if plan is not None:
        before = [(span.seq_len, span.global_batch_size) for span in plan.spans]
    now = [(stage.seq_len, stage.global_batch_size) for stage in config.stages]
    if before != now:
        raise ConfigError(
            f"{checkpoint} was trained with stages of (seq_len, global_batch_size) {before}, now "
            f"they are {now}. Change them back, or start another run with a new --run_dir."
        )
    return plan


ARCHITECTURE_KEYS = (
    "head_dim",
    "layer_types",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
)
"""Keys of config.json that change what the model computes and not the shape of any tensor."""


def architecture_problems(
    state: RunState, checkpoint: str, model_config: GptOssConfig
) -> list[str]:
    """Return every key of the model's configuration that differs from that of a checkpoint.

    Args:
        state: The checkpoint's.
        checkpoint: Its name.
        model_config: The model as it is now; keys that one of the two lacks are not compared.
    """
    saved = state.model_config
    now = json.loads(model_config.to_json_string(use_diff=False))
    problems = []
    for key in ARCHITECTURE_KEYS:
        if key in saved and key in now and saved[key] != now[key]:
            problems.append(
                f"{checkpoint} was trained with {key} {json.dumps(saved[key])} of the model's "
                f"config.json, now it is {json.dumps(now[key])}."
            )
    if problems:
        problems.append("Restore config.json, or start another run with a new --run_dir.")
    return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """The ledger and the progress that a run goes on with."""

    ledger: Ledger
    progress: Progress
    stages: StagePlan | None
    """Where the stages of the run begin; None for a run without stages."""

    @property
    def stage(self) -> int:
        """Number of the stage of the next batch, counted from 0."""
        return 0 if self.stages is None else self.stages.stage_of(self.progress.next_batch)


def fresh_start(
    mix: MixConfig,
    data: BuiltData | None,
    config: RunConfig,
    given_up: Sequence[tuple[int, int]] = (),
) -> StartingPoint:
    """Return the beginning of a run.

    Args:
        mix: The mix.
        data: Its build; None leaves the hashes of its rows out of the ledger.
        config: The run.
        given_up: Batches that rollbacks have given up.

    Raises:
        ConfigError: it cannot follow the schedule of the mix, or has not as many steps as stages.
    """
    rows = None if data is None else data.manifest.row_hashes()
    return StartingPoint(
        ledger=Ledger.start(mix, rows, config.train.total_steps),
        progress=Progress(skip_ranges=merged(given_up)),
        stages=planned_stages(config, mix),
    )


def starting_point(
    state: RunState,
    checkpoint: str,
    config: RunConfig,
    model_config: GptOssConfig,
    mix: MixConfig,
    data: BuiltData | None,
    *,
    given_up: Sequence[tuple[int, int]],
    accept_mix_change: bool,
) -> StartingPoint:
    """Return where a run goes on from a checkpoint.

    Args:
        state: The checkpoint's.
        checkpoint: Its name.
        config: The run as it is configured now.
        model_config: The model as it is now.
        mix: The mix as it is now.
        data: Its build; None leaves out the check that no rows changed.
        given_up: Batches that rollbacks have given up since the checkpoint.
        accept_mix_change: Go on although the mix was edited since.

    Raises:
        ConfigError: the run is another one, or its mix was edited and that is not accepted; all of
            it.
        CheckpointError: the checkpoint lacks what a run needs.
    """
    if state.begins_a_run:
        problems = architecture_problems(state, checkpoint, model_config)
        if problems:
            raise ConfigError(problems)
        return fresh_start(mix, data, config, given_up)
    progress = Progress.from_json(state.part("progress", checkpoint))
    progress.skip_ranges = merged([*progress.skip_ranges, *given_up])
    problems = RunIdentity.of(config).problems(state, checkpoint)
    problems += architecture_problems(state, checkpoint, model_config)
    ledger = None
    stages = None
    try:
        stages = stored_stages(state, checkpoint, config)
    except ConfigError as error:
        problems += error.problems
    try:
        ledger = resume_ledger(
            state.part("ledger", checkpoint),
            mix,
            progress.next_batch,
            accept_change=accept_mix_change,
            rows=None if data is None else data.manifest.row_hashes(),
            total_steps=config.train.total_steps,
        )
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    assert ledger is not None
    return StartingPoint(ledger=ledger, progress=progress, stages=stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedCheckpoint:
    """The checkpoint that a run will probably go on from; its files have the right sizes."""

    step: int
    """Optimizer steps done."""
    name: str
    """Name of its folder."""
    state: RunState
    """Its state besides tensors."""
    tensors: Mapping[str, TensorRecord]
    """Its tensors by name of the parameter."""
    rejected: tuple[str, ...]
    """Reasons why newer ones are passed over."""

    def stage(self, run_dir: Path, config: RunConfig) -> int:
        """Return the number of the stage in which a run goes on from here, counted from 0.

        Raises:
            ConfigError: the run has other stages now.
            CheckpointError: the checkpoint lacks what a run needs.
        """
        if self.state.begins_a_run:
            return 0
        stages = stored_stages(self.state, self.name, config)
        if stages is None:
            return 0
        progress = Progress.from_json(self.state.part("progress", self.name))
        given_up = skipped_by(read_rollbacks(run_dir))
        skipped = merged([*progress.skip_ranges, *given_up])
        return stages.stage_of(batch_of_step(progress.step, skipped))

    def check_model(self, model_config: GptOssConfig, adapter: AdapterSection, dtype: str) -> None:
        """Refuse a checkpoint of another model, or of another adapter.

        Args:
            model_config: The model as it is now.
            adapter: The `adapter` section as it is now.
            dtype: `train.dtype` as it is now.

        Raises:
            ConfigError: it is an adapter and the run has none, or another one, or the reverse.
            CheckpointError: the parameters are others.
        """
        refuse_other_adapter(self.state, self.name, adapter, model_config, dtype)
        shapes = adapter_shapes(adapter, model_config) or parameter_shapes(model_config)
        check_same_tensors(self.name, self.tensors, fp32_records(shapes))

    def check_base(self, base: AdapterBase) -> None:
        """Refuse an adapter of another base.

        Raises:
            ConfigError: with both hashes.
        """
        refuse_other_base(self.state, self.name, base)


def refuse_other_adapter(
    state: RunState,
    checkpoint: str,
    adapter: AdapterSection,
    model_config: GptOssConfig,
    dtype: str,
) -> None:
    """Refuse a checkpoint whose adapter is not that of a run.

    Args:
        state: The checkpoint's.
        checkpoint: Its name.
        adapter: The `adapter` section of the run.
        model_config: The model's configuration.
        dtype: `train.dtype` of the run.

    Raises:
        ConfigError: all that differs, with both values.
        CheckpointError: what the checkpoint says of its adapter cannot be used.
    """
    saved = AdapterState.of(state, checkpoint)
    problems = []
    if saved is None and adapter.is_on:
        problems.append(whole_model_problem(checkpoint))
    elif saved is not None and not adapter.is_on:
        problems.append(no_adapter_problem(checkpoint))
    elif saved is not None:
        problems += saved.problems(adapter, dtype, model_config, checkpoint)
    if problems:
        raise ConfigError(problems)


def refuse_other_base(state: RunState, checkpoint: str, base: AdapterBase) -> None:
    """Refuse a checkpoint whose adapter was trained on another base.

    Raises:
        ConfigError: with both hashes.
        CheckpointError: what the checkpoint says of its adapter cannot be used.
    """
    saved = AdapterState.of(state, checkpoint)
    problems = [] if saved is None else saved.base_problems(base, checkpoint)
    if problems:
        raise ConfigError(problems)


def expected_checkpoint(run_dir: Path, resume: str) -> ExpectedCheckpoint | None:
    """Return the checkpoint that a run will probably go on from; None at the beginning of a run.

    Manifests and the sizes of files are read, not their contents: a checkpoint whose hashes are
    wrong is passed over when the run loads it.

    Args:
        run_dir: The run directory.
        resume: `auto`, `never` or a step.

    Raises:
        ConfigError: there is no checkpoint of the step asked for.
        CheckpointError: there are checkpoints, but none can be used.
    """
    if resume == "never":
        return None
    step, rejected = first_sound(run_dir, candidates(run_dir, resume), refusal_unread)
    if step is None:
        return None
    folder = step_folder(run_dir, step)
    manifest = read_manifest(folder)
    return ExpectedCheckpoint(
        step=step,
        name=folder.name,
        state=RunState.from_json(manifest.state, folder.name),
        tensors=manifest.tensors,
        rejected=tuple(rejected),
    )


def start_from(
    checkpoint: ExpectedCheckpoint,
    run_dir: Path,
    config: RunConfig,
    model_config: GptOssConfig,
    mix: MixConfig,
    data: BuiltData | None,
) -> StartingPoint:
    """Return where a run goes on from a checkpoint that is not loaded yet.

    Args:
        checkpoint: The checkpoint.
        run_dir: The run directory.
        config: The run as it is configured now.
        model_config: The model as it is now.
        mix: The mix as it is now.
        data: Its build; None if there is none yet.

    Raises:
        ConfigError, CheckpointError: see `starting_point`.
    """
    return starting_point(
        checkpoint.state,
        checkpoint.name,
        config,
        model_config,
        mix,
        data,
        given_up=skipped_by(read_rollbacks(run_dir)),
        accept_mix_change=config.data.accept_mix_change,
    )
