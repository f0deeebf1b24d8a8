"""The rows that a step of a run took: a function of its ledger, seed and step.

newest checkpoint -> ledger, batches given up, borders of stages
config.resolved.yaml -> rows of a step, mix
    -> batch -> stage -> Mixture -> (source, row) of each row of the global batch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.given_up_batches import batch_of_step, merged, read_rollbacks, skipped_by
from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import first_sound, list_steps, refusal_unread, step_folder
from cpt.checkpoint.run_state import RunState
from cpt.errors import CheckpointError, ConfigError
from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.yaml_text import read_yaml
from data_pipeline.build.found_builds import load_built_mix, matching_builds
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.epochs import with_weights
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import GlobalBatch
from data_pipeline.mixture.stages import StagePlan, mixture_of, plan_stages

CONFIG = "config.resolved.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What decides the rows of a run's steps."""

    data: BuiltData
    """The build that the run reads, of its first stage."""
    mix: MixConfig
    """The mix as its file is now; only its paths are used, and its seed before a checkpoint."""
    ledger: Ledger
    """The mixture, as the newest checkpoint has it."""
    skip_ranges: tuple[tuple[int, int], ...]
    """Batches that rollbacks have given up."""
    global_batch_size: int
    """Packed rows of a step of a run without stages."""
    stages: StagePlan | None
    """Where the stages of the run begin; None for a run without stages."""
    saved_step: int
    """Step of the newest checkpoint; 0 if there is none."""

    def at_step(self, step: int) -> StepData:
        """Return what decides the rows of a step, counted from 1 as in metrics.jsonl."""
        batch = batch_of_step(step - 1, self.skip_ranges)
        if self.stages is None:
            return StepData(run=self, data=self.data, batch=batch, num_rows=self.global_batch_size)
        stage = self.stages.stage_of(batch)
        num_rows = self.stages.spans[stage].global_batch_size
        return StepData(run=self, data=self.data.of_stage(stage), batch=batch, num_rows=num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """What decides the rows of one step."""

    run: RunData
    """The run."""
    data: BuiltData
    """Its build, of the stage that the step is in."""
    batch: int
    """Number of the batch that the step took, counted from 0."""
    num_rows: int
    """Packed rows of the step."""

    def draw(self) -> GlobalBatch:
        """Return the rows.

        Raises:
            DataError: the data does not last so long.
        """
        ledger = self.run.ledger
        seed = ledger.segments[0].settings.get("seed", self.run.mix.seed)
        mixture = mixture_of(self.data, ledger, seed, self.run.stages)
        return mixture.global_batch(self.batch, self.num_rows)


def open_run_data(run_dir: Path, build_dir: Path | None) -> RunData:
    """Open what decides the rows of a run.

    Args:
        run_dir: The run directory.
        build_dir: The build, where it is no longer at the place that the run knew.

    Raises:
        ConfigError: the run has not started, its build is not found, or it is another one.
        CheckpointError: its checkpoints cannot be used.
        DataError: the build cannot be read.
    """
    config = _read_config(run_dir)
    mix_file = Path(config["data"]["mix"])
    known = config["data"]["build_dir"]
    folder = build_dir or (None if known is None else Path(known))
    mix = load_built_mix(mix_file, folder)
    if folder is None:
        found = matching_builds(mix)
        if len(found) != 1:
            raise ConfigError(
                f"{run_dir}: {len(found)} builds of {mix_file} are below the current folder. Name "
                "the one of the run with --build_dir."
            )
        folder = found[0]
    data = BuiltData.open(folder, verify=False)
    state = _newest_state(run_dir, mix, data, config)
    _check_rows(run_dir, state.ledger, data)
    _check_stages(run_dir, state.stages, data)
    return RunData(
        data=data,
        mix=mix,
        ledger=state.ledger,
        skip_ranges=merged([*state.skip_ranges, *skipped_by(read_rollbacks(run_dir))]),
        global_batch_size=int(config["train"]["global_batch_size"]),
        stages=state.stages,
        saved_step=state.step,
    )


def _read_config(run_dir: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run.

    Raises:
        ConfigError: there is none.
    """
    path = run_dir / CONFIG
    try:
        config = read_yaml(path, follow_links=False)
        if isinstance(config["data"]["mix"], str) and config["train"]["global_batch_size"]:
            return {**config, "data": {"build_dir": None, **config["data"]}}
        reason = "its keys are others"
    except OSError as error:
        reason = error.strerror or str(error)
    except (MalformedInput, KeyError, TypeError) as error:
        reason = str(error)
    raise ConfigError(f"{path}: not the configuration of a run that has started ({reason}).")


@dataclass(frozen=True, kw_only=True, slots=True)
class _DrawState:
    """What a checkpoint knows of the rows of a run."""

    step: int
    """Its step; 0 for a run that has saved nothing."""
    ledger: Ledger
    """The mixture."""
    skip_ranges: list[tuple[int, int]]
    """Batches given up."""
    stages: StagePlan | None
    """Where stages begin."""


def _newest_state(
    run_dir: Path, mix: MixConfig, data: BuiltData, config: dict[str, Any]
) -> _DrawState:
    """Return what the newest checkpoint knows, or what a fresh run begins with.

    Raises:
        CheckpointError: it lacks its ledger.
        ConfigError: the run cannot begin so.
    """
    step, _ = first_sound(run_dir, list_steps(run_dir), refusal_unread)
    state = None
    if step is not None:
        folder = step_folder(run_dir, step)
        state = RunState.of(read_manifest(folder))
    if step is None or state is None or state.begins_a_run:
        total_steps = int(config["train"].get("total_steps", 0))
        return _DrawState(
            step=0,
            ledger=Ledger.start(
                with_weights(mix, data.manifest), data.manifest.row_hashes(), total_steps
            ),
            skip_ranges=[],
            stages=_planned_stages(run_dir, mix, config, total_steps),
        )
    progress = state.part("progress", folder.name)
    try:
        ranges = [(int(first), int(last)) for first, last in progress.get("skip_ranges", [])]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.name}: its skip_ranges are no ranges: {error}.") from error
    stages = state.part("identity", folder.name).get("stages")
    return _DrawState(
        step=step,
        ledger=Ledger.from_json(state.part("ledger", folder.name)),
        skip_ranges=ranges,
        stages=None if stages is None else StagePlan.from_json(stages),
    )


def _planned_stages(
    run_dir: Path, mix: MixConfig, config: dict[str, Any], total_steps: int
) -> StagePlan | None:
    """Return where the stages of a run begin that has saved nothing; None without stages.

    Raises:
        ConfigError: its configuration has other stages than the mix.
    """
    listed = config.get("stages") or []
    if not listed and not mix.stages:
        return None
    if len(listed) != len(mix.stages):
        raise ConfigError(
            f"{run_dir / CONFIG}: has {len(listed)} stages, its mix {mix.name} has "
            f"{len(mix.stages)}. Change the mix back."
        )
    sizes = [int(stage["global_batch_size"]) for stage in listed]
    return plan_stages(mix.stages, sizes, total_steps)


def _check_stages(run_dir: Path, stages: StagePlan | None, data: BuiltData) -> None:
    """Refuse a build with rows of other lengths than the run took.

    Raises:
        ConfigError: naming both.
    """
    if stages is None:
        return
    of_run = [span.seq_len for span in stages.spans]
    of_build = list(data.manifest.row_lengths)
    if of_run != of_build:
        raise ConfigError(
            f"{data.directory} is not the build of {run_dir}: its rows have {of_build} tokens, "
            f"those of the run {of_run}. Name the right one with --build_dir."
        )


def _check_rows(run_dir: Path, ledger: Ledger, data: BuiltData) -> None:
    """Refuse a build with other rows than the run took.

    Raises:
        ConfigError: naming the sources that differ.
    """
    now = data.manifest.row_hashes()
    other = []
    for segment in ledger.segments:
        for name in segment.drawn_sources():
            rows = segment.rows.get(name)
            if rows is not None and now.get(name) != rows and name not in other:
                other.append(name)
    if other:
        raise ConfigError(
            f"{data.directory} is not the build of {run_dir}: the rows of {', '.join(other)} are "
            "others. Name the right one with --build_dir."
        )
