"""Compare the mix with the run, build it if it is missing and small, and open it.

The functions that need no process group are also those of the gate (`cpt.job.gate`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpt.checkpoint.given_up_batches import batch_of_step
from cpt.checkpoint.starting_model import weight_files
from cpt.config import DataSection, RunConfig
from cpt.errors import ConfigError, DataError, StorageError
from cpt.job.build_check import verify_together
from cpt.job.context import RunContext
from cpt.job.replay_check import check_replay
from cpt.job.resumption import StartingPoint
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.storage.local_copies import local_copy
from cpt.training.kl_targets import KLTargets, check_targets
from data_pipeline.build.build import build
from data_pipeline.build.found_builds import (
    DEFAULT_ROOT,
    can_be_read,
    found_or_default,
    input_bytes,
    load_built_mix,
    matching_builds,
)
from data_pipeline.build.origin import compare
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.strict_yaml import load_yaml
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import DataPlan, make_data_plan
from data_pipeline.mixture.staged_plan import StagedPlan, make_staged_plan
from data_pipeline.store.manifest import read_manifest

log = logging.getLogger("cpt.job.data")

WORTHLESS_EPOCHS = 40
"""Epochs beyond which repeated text teaches almost nothing."""


def check_mix(
    settings: DataSection,
    seq_len: int | None,
    stage_lengths: Sequence[int] | None = None,
    *,
    need_files: bool,
) -> MixConfig:
    """Read the data-mix YAML and compare it with the run.

    Args:
        settings: The `data` section of the run YAML.
        seq_len: Tokens of a packed row in the run; None if that is not known.
        stage_lengths: The same in each stage of the run, none for a run without stages; None if
            that is not known.
        need_files: Whether to look at the files that the mix names. That is at least a request to
            the storage for each of them, so one rank does it for all.

    Returns:
        The mix; where it is built, its files need not be here.

    Raises:
        ConfigError: everything wrong in the mix, and rows of another length than the run's.
    """
    mix_file = settings.mix
    try:
        if need_files:
            mix = load_built_mix(mix_file, settings.build_dir)
        else:
            mix = load_mix(mix_file, need_files=False)
    except ConfigError as error:
        written = load_yaml(mix_file).value
        rows = written.get("seq_len") if isinstance(written, dict) else None
        raise ConfigError([*error.problems, *seq_len_problems(mix_file, rows, seq_len)]) from error
    problems = seq_len_problems(mix_file, mix.seq_len, seq_len)
    if stage_lengths is not None:
        problems += stage_problems(mix_file, [stage.seq_len for stage in mix.stages], stage_lengths)
    if problems:
        raise ConfigError(problems)
    return mix


def seq_len_problems(mix_file: Path, of_mix: Any, of_run: int | None) -> list[str]:
    """Return the problem of rows with another length than the run's.

    Args:
        mix_file: The data-mix YAML.
        of_mix: Its seq_len; what is no number is told by the mix itself.
        of_run: train.seq_len; None if it is not known.
    """
    if not isinstance(of_mix, int) or of_run is None or of_mix == of_run:
        return []
    return [
        f"train.seq_len is {of_run}, but rows of {mix_file} have seq_len {of_mix}. "
        "Make them equal: rows are packed when the data is built."
    ]


def stage_problems(mix_file: Path, of_mix: Sequence[int], of_run: Sequence[int]) -> list[str]:
    """Return the problem of stages that only one of mix and run has, or that differ.

    Args:
        mix_file: The data-mix YAML.
        of_mix: Tokens of a row in each of its stages.
        of_run: Tokens of a row in each stage of the run YAML.
    """
    if list(of_mix) == list(of_run):
        return []
    told = []
    for lengths in (of_run, of_mix):
        told.append(f"rows of {', '.join(map(str, lengths))}" if lengths else "none")
    return [
        f"stages: the run YAML has {told[0]}, {mix_file} has {told[1]}. Give both the same lengths "
        "in the same order; the entries of the run YAML say in which layout each is trained."
    ]


def build_folder(settings: DataSection, mix: MixConfig) -> Path:
    """Return the folder of a built mix, or of one that is small enough to be built at the start.

    Raises:
        ConfigError: the mix is not built, and has too much input to be built at the start of a run.
        DataError: an input file cannot be read.
    """
    limit = settings.auto_build_limit_bytes
    if settings.build_dir is None and not can_be_read(mix, limit):
        return _folder_by_names(settings, mix)
    folder = settings.build_dir or found_or_default(mix)
    if folder.exists():
        return folder
    if not can_be_read(mix, limit):
        raise ConfigError(_not_built(settings, mix, f" --out {folder}"))
    return folder


def _folder_by_names(settings: DataSection, mix: MixConfig) -> Path:
    """Return the build of a mix with too much input to read it at every start.

    Raises:
        ConfigError: no folder in data/ holds a build of the mix, or several may.
    """
    found = matching_builds(mix)
    if len(found) > 1:
        raise ConfigError(
            f"{', '.join(map(str, found))}: each holds a build of {settings.mix} by the names and "
            "sizes of its files. Name one of them with data.build_dir."
        )
    if not found:
        raise ConfigError(_not_built(settings, mix, ""))
    return found[0]


def _not_built(settings: DataSection, mix: MixConfig, option: str) -> str:
    size = input_bytes(mix)
    limit = settings.auto_build_limit_bytes
    return (
        f"{settings.mix} is not built and has {size / 1e6:.0f} MB of input, more than "
        f"data.auto_build_limit_bytes ({limit / 1e6:.0f} MB). Build it first: "
        f"python -m data_pipeline build {settings.mix}{option}. A build that is not in "
        f"{DEFAULT_ROOT}/ is named with --set data.build_dir=FOLDER; one by older rules is taken "
        "with data.accept_stale_build=true beside it."
    )


def open_current_build(settings: DataSection, mix: MixConfig, folder: Path) -> BuiltData:
    """Open the build of a mix, without reading it to its end.

    Raises:
        DataError: it is the build of another mix or of other files, incomplete or damaged.
    """
    check_origin(settings, mix, folder)
    return BuiltData.open(folder, verify=False, mix=mix)


def check_origin(settings: DataSection, mix: MixConfig, folder: Path) -> None:
    """Refuse a build that was made by other rules or from other files than the mix has by now.

    Contents of files are compared if there is no more input than a run may build by itself.

    Args:
        settings: The `data` section of the run YAML.
        mix: The mix as it is.
        folder: Its build.

    Raises:
        DataError: naming what differs, unless the run accepts it; or the build cannot be read.
    """
    manifest = read_manifest(folder)
    is_small = can_be_read(mix, settings.auto_build_limit_bytes)
    found = compare(manifest, mix, read_contents=is_small)
    if found.absent:
        log.info(
            "%s: files of %s are not here; what is here was compared with the mix",
            folder,
            ", ".join(found.absent),
        )
    if not found.differences:
        return
    lines = "\n  ".join(found.differences)
    if settings.accept_stale_build:
        log.warning("%s is not %s as it is, as accepted:\n  %s", folder, settings.mix, lines)
        return
    raise DataError(
        f"{folder} is not a build of {settings.mix} as it is:\n  {lines}\n"
        f"Build it again (python -m data_pipeline build {settings.mix} --out OTHER, and "
        "data.build_dir), undo the change, or train on the build as it is: "
        "--set data.accept_stale_build=true."
    )


def open_data(context: RunContext) -> BuiltData:
    """Open the shards of the mix on all ranks; the first rank builds them if they are missing.

    Raises:
        ConfigError: there is too much input to build, or replay was written by another model.
        DataError: the input or the build is not usable.
    """
    config, mix = context.config, context.mix

    def build_if_missing() -> str:
        folder = build_folder(config.data, mix)
        if not folder.exists():
            log.info("building token shards in %s", folder)
            build(mix, folder, progress=True)
        return str(folder)

    built = Path(on_first_rank(context.control_group, build_if_missing))
    folder = verified_place(context.control_group, built)
    data = together(context.control_group, lambda: BuiltData.open(folder, mix=mix, is_checked=True))
    on_first_rank(context.control_group, lambda: check_replay(config, data))
    return data.of_stage(config.stage)


def verified_place(group: dist.ProcessGroup, folder: Path) -> Path:
    """Return where this rank reads a build: this node's copy, or the build itself.

    If the copy of any node is not what it should be, all ranks read the build itself.

    Raises:
        DataError: on all ranks: the build is incomplete or damaged.
    """
    copy = local_copy(folder)
    has_copies = any(gather_json(copy != folder, group))
    try:
        verify_together(group, copy)
        return copy
    except (DataError, StorageError, ConfigError) as error:
        if not has_copies:
            raise
        log.warning("%s\nAll nodes read the build from shared storage: %s", error, folder)
    verify_together(group, folder)
    return folder


def base_files(config: RunConfig) -> list[Path]:
    """Return the files that the model a run starts from is known by; none for random weights."""
    if config.model.path is None:
        return []
    return weight_files(config.model.path)


def base_name(config: RunConfig) -> str:
    """Return the name of that model in messages."""
    return str(config.model.path or f"init: {config.model.init}")


def open_kl_targets(config: RunConfig, data: BuiltData, topology: Topology) -> KLTargets | None:
    """Open the base model's distributions, if the run asks for them.

    Raises:
        ConfigError: on all ranks: they belong to another model or to other rows.
        DataError: on all ranks: a file is missing or damaged.
    """
    group = topology.control_group
    folder = config.train.kl_targets
    if folder is None:
        return None
    files, name = base_files(config), base_name(config)
    on_first_rank(group, lambda: check_targets(folder, data, files, name))
    row_tokens = {source: data.row_tokens(i) for i, source in enumerate(data.source_names)}
    targets = together(group, lambda: KLTargets(folder, data.source_names, row_tokens))
    log.info("divergence from the base model on rows of %s", ", ".join(targets.sources))
    return targets


def plan_of(
    config: RunConfig, data: BuiltData, mix: MixConfig, start: StartingPoint
) -> DataPlan | StagedPlan:
    """Return what a run draws from each source until its last step."""
    ledger = start.ledger
    last_step = max(1, config.train.total_steps) - 1
    batches = batch_of_step(last_step, start.progress.skip_ranges) + 1
    if start.stages is not None:
        return make_staged_plan(data, mix, start.stages, batches, ledger)
    return make_data_plan(data, mix, batches, config.train.global_batch_size, ledger)


def warn_of_little_text(config: RunConfig, plan: DataPlan | StagedPlan) -> None:
    """Warn of a trained model that reads so little text that most of the run teaches nothing.

    Random weights are no loss. Repetition adds almost nothing beyond some 40 epochs (Muennighoff et
    al., arXiv 2305.16264).
    """
    sources = plan.whole().sources
    available = sum(source.tokens for source in sources if source.drawn_tokens)
    drawn = sum(source.drawn_tokens for source in sources)
    if config.model.path is None or drawn <= WORTHLESS_EPOCHS * available:
        return
    log.warning(
        "the mix has %s tokens and the run takes %s: every text is read %.0f times on average. "
        "More than %d add almost nothing, and the model forgets the rest. Add data (the sample mix "
        "is for trying the program), or lower train.total_steps.",
        f"{available:,}",
        f"{drawn:,}",
        drawn / max(available, 1),
        WORTHLESS_EPOCHS,
    )


def check_plan(config: RunConfig, plan: DataPlan | StagedPlan) -> None:
    """Refuse a run that its data cannot feed, instead of stopping at the step where it runs dry.

    Raises:
        DataError: a source would be read more often than its max_epochs allows, or a floor is not
            met.
    """
    if plan.problems and config.train.total_steps > 0:
        raise DataError("\n".join(["the data cannot feed this run:", *plan.problems]))
