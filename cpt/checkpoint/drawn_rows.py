"""The rows that a step of a run took: a function of its ledger, seed and step.

newest checkpoint -> ledger, batches given up;  config.resolved.yaml -> rows of a step, mix
    -> Mixture -> (source, row) of each row of the global batch
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
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import GlobalBatch, Mixture

CONFIG = "config.resolved.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What decides the rows of a run's steps."""

    data: BuiltData
    """The build that the run reads."""
    mix: MixConfig
    """The mix as its file is now; only its paths are used, and its seed before a checkpoint."""
    ledger: Ledger
    """The mixture, as the newest checkpoint has it."""
    skip_ranges: tuple[tuple[int, int], ...]
    """Batches that rollbacks have given up."""
    global_batch_size: int
    """Packed rows of a step."""
    saved_step: int
    """Step of the newest checkpoint; 0 if there is none."""

    def batch(self, step: int) -> GlobalBatch:
        """Return the rows of a step, counted from 1 as in metrics.jsonl.

        Raises:
            DataError: the data does not last so long.
        """
        seed = self.ledger.segments[0].settings.get("seed", self.mix.seed)
        mixture = Mixture(self.data, self.ledger, seed)
        batch = batch_of_step(step - 1, self.skip_ranges)
        return mixture.global_batch(batch, self.global_batch_size)


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
    if mix.stages:
        raise ConfigError(
            f"{mix_file}: has stages, and the rows of a step in stages are not told. Ask for a "
            "document: --build_dir, --source and --document."
        )
    total_steps = int(config["train"].get("total_steps", 0))
    step, ledger, skip_ranges = _newest_state(run_dir, mix, data, total_steps)
    _check_rows(run_dir, ledger, data)
    return RunData(
        data=data,
        mix=mix,
        ledger=ledger,
        skip_ranges=merged([*skip_ranges, *skipped_by(read_rollbacks(run_dir))]),
        global_batch_size=int(config["train"]["global_batch_size"]),
        saved_step=step,
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


def _newest_state(
    run_dir: Path, mix: MixConfig, data: BuiltData, total_steps: int
) -> tuple[int, Ledger, list[tuple[int, int]]]:
    """Return (step, ledger, batches given up) of the newest checkpoint, or of a fresh run.

    Raises:
        CheckpointError: it lacks its ledger.
    """
    step, _ = first_sound(run_dir, list_steps(run_dir), refusal_unread)
    if step is None:
        return 0, Ledger.start(mix, data.manifest.row_hashes(), total_steps), []
    folder = step_folder(run_dir, step)
    state = RunState.of(read_manifest(folder))
    progress = state.part("progress", folder.name)
    try:
        ranges = [(int(first), int(last)) for first, last in progress.get("skip_ranges", [])]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.name}: its skip_ranges are no ranges: {error}.") from error
    return step, Ledger.from_json(state.part("ledger", folder.name)), ranges


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
