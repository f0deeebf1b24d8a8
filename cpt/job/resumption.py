"""Find where a run goes on: the parts of a checkpoint that decide which rows come next.

The gate reads them from the newest manifest before weights are read; `cpt.job.job.Job.restore`
reads them again from the checkpoint whose tensors were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import candidates, step_folder
from cpt.checkpoint.run_state import RunState
from cpt.config import RunConfig
from cpt.errors import CheckpointError, ConfigError
from cpt.job.progress import Progress, merged, read_rollbacks, skipped_by
from cpt.job.seam import Seam
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger, resume_ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """The settings that may not change when a run is resumed."""

    seed: int
    seq_len: int
    """Tokens of a packed row."""
    global_batch_size: int
    """Packed rows of one optimizer step."""

    @classmethod
    def of(cls, config: RunConfig) -> RunIdentity:
        """Return the identity of a run."""
        train = config.train
        return cls(
            seed=train.seed, seq_len=train.seq_len, global_batch_size=train.global_batch_size
        )

    def check(self, state: RunState, checkpoint: str) -> None:
        """Refuse to go on from a checkpoint of another run.

        Raises:
            ConfigError: naming every value that differs.
        """
        saved = state.part("identity", checkpoint)
        problems = []
        for name, value in asdict(self).items():
            if saved.get(name) != value:
                problems.append(
                    f"{checkpoint} was trained with {name} {saved.get(name)}, now it is {value}."
                )
        if problems:
            advice = "Change it back, or start another run with a new --run_dir."
            raise ConfigError([*problems, advice])


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """The ledger and the progress that a run goes on with."""

    ledger: Ledger
    progress: Progress
    seam: Seam | None = None
    """What changes since the checkpoint; None at the beginning of a run."""


def fresh_start(mix: MixConfig, data: BuiltData) -> StartingPoint:
    """Return the beginning of a run."""
    ledger = Ledger.start(mix, data.manifest.row_hashes())
    return StartingPoint(ledger=ledger, progress=Progress())


def starting_point(
    state: RunState,
    checkpoint: str,
    config: RunConfig,
    mix: MixConfig,
    data: BuiltData,
    *,
    given_up: Sequence[tuple[int, int]],
    accept_mix_change: bool,
) -> StartingPoint:
    """Return where a run goes on from a checkpoint.

    Args:
        state: The checkpoint's.
        checkpoint: Its name.
        config: The run as it is configured now.
        mix: The mix as it is now.
        data: Its build.
        given_up: Batches that rollbacks have given up since the checkpoint.
        accept_mix_change: Go on although the mix was edited since.

    Raises:
        ConfigError: the run is another one, or its mix was edited and that is not accepted.
        CheckpointError: the checkpoint lacks what a run needs.
    """
    RunIdentity.of(config).check(state, checkpoint)
    progress = Progress.from_json(state.part("progress", checkpoint))
    progress.skip_ranges = merged([*progress.skip_ranges, *given_up])
    ledger = resume_ledger(
        state.part("ledger", checkpoint),
        mix,
        progress.next_batch,
        accept_change=accept_mix_change,
        rows=data.manifest.row_hashes(),
    )
    return StartingPoint(ledger=ledger, progress=progress)


def expected_start(
    run_dir: Path, resume: str, config: RunConfig, mix: MixConfig, data: BuiltData
) -> StartingPoint:
    """Return where a run will probably go on: from the newest checkpoint with a readable manifest.

    Its files are not hashed here; a damaged one is passed over when the run loads it.

    Raises:
        ConfigError, CheckpointError: see `starting_point`.
    """
    steps = [] if resume == "never" else candidates(run_dir, resume)
    for step in steps:
        folder = step_folder(run_dir, step)
        try:
            state = RunState.from_json(read_manifest(folder).state, folder.name)
        except CheckpointError:
            continue
        start = starting_point(
            state,
            folder.name,
            config,
            mix,
            data,
            given_up=skipped_by(read_rollbacks(run_dir)),
            accept_mix_change=config.data.accept_mix_change,
        )
        return replace(start, seam=Seam.of(state, folder.name, step, config))
    return fresh_start(mix, data)
