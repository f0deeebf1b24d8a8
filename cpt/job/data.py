"""The data of a run: the mix is compared with the run, built if it is missing and small, opened,
and planned.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cpt.config import RunConfig
from cpt.errors import ConfigError, DataError
from cpt.job.progress import Progress, batch_of_step
from cpt.model.weights.hf_layout import tensor_files
from cpt.parallel.agreement import on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.training.kl_targets import KLTargets, check_targets
from data_pipeline.build.build import build, input_bytes, resolve_build_dir
from data_pipeline.build.self_replay import check_base_model
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import make_data_plan
from data_pipeline.mixture.ledger import Ledger

log = logging.getLogger("cpt.job.data")


def check_mix(config: RunConfig) -> MixConfig:
    """Read the data-mix YAML and compare it with the run.

    Raises:
        ConfigError: it cannot be right, or packs rows of another length.
    """
    mix = load_mix(config.data.mix)
    if mix.seq_len != config.train.seq_len:
        raise ConfigError(
            f"train.seq_len is {config.train.seq_len}, but rows of {config.data.mix} have seq_len {mix.seq_len}. "
            "Make them equal: rows are packed when the data is built."
        )
    return mix


def open_data(config: RunConfig, mix: MixConfig, topology: Topology) -> BuiltData:
    """Open the built shards of a mix, building them first if they are missing and small.

    Raises:
        ConfigError: there is too much input to build on the spot.
        DataError: the input or the build is not usable.
        ConfigError: it holds replay that another model wrote.
    """
    directory = config.data.build_dir

    def build_if_missing() -> str:
        where = resolve_build_dir(mix, directory)
        if not where.exists():
            size, limit = input_bytes(mix), config.data.auto_build_limit_bytes
            if size > limit:
                raise ConfigError(
                    f"{config.data.mix} is not built and has {size / 1e6:.0f} MB of input, more than "
                    f"data.auto_build_limit_bytes ({limit / 1e6:.0f} MB). Build it first: "
                    f"python -m data_pipeline build {config.data.mix} --out {where}"
                )
            log.info("building token shards in %s", where)
            build(mix, where, progress=True)
        return str(where)

    built = on_first_rank(topology.control_group, build_if_missing)
    data = together(topology.control_group, lambda: BuiltData.open(Path(built), mix=mix))
    on_first_rank(topology.control_group, lambda: check_replay(config, data))
    return data


def check_replay(config: RunConfig, data: BuiltData) -> None:
    """Refuse replay that another model wrote than the one this run starts from.

    Raises:
        ConfigError: naming every such source.
    """
    replayed = {source.name: source.base_model for source in data.manifest.sources}
    files = base_files(config) if any(replayed.values()) else []
    problems = check_base_model(replayed, files, base_name(config))
    if problems:
        raise ConfigError(problems)


def base_files(config: RunConfig) -> list[Path]:
    """Weight files of the model that a run starts from; none for random weights."""
    return (
        [] if config.model.path is None else sorted(set(tensor_files(config.model.path).values()))
    )


def base_name(config: RunConfig) -> str:
    """What a message calls that model."""
    return str(config.model.path or f"init: {config.model.init}")


def open_kl_targets(config: RunConfig, data: BuiltData, topology: Topology) -> KLTargets | None:
    """The base model's distributions, if the run asks for them.

    Raises:
        ConfigError: on all ranks: they are of another model or of other rows.
        DataError: on all ranks: a file is missing or damaged.
    """
    folder, group = config.train.kl_targets, topology.control_group
    if folder is None:
        return None
    on_first_rank(group, lambda: check_targets(folder, data, base_files(config), base_name(config)))
    row_tokens = {name: data.row_tokens(number) for number, name in enumerate(data.source_names)}
    targets = together(group, lambda: KLTargets(folder, data.source_names, row_tokens))
    log.info("divergence from the base model on rows of %s", ", ".join(targets.sources))
    return targets


def check_plan(
    config: RunConfig, data: BuiltData, mix: MixConfig, ledger: Ledger, progress: Progress
) -> None:
    """Refuse a run that its data cannot feed, now and not at the step where it runs dry.

    Raises:
        DataError: a source would be read more often than its max_epochs allows, or a floor is not
            met.
    """
    if config.train.total_steps == 0:
        return
    batches = batch_of_step(config.train.total_steps - 1, progress.skip_ranges) + 1
    plan = make_data_plan(data, mix, batches, config.train.global_batch_size, ledger)
    for warning in plan.warnings:
        log.warning("data plan: %s", warning)
    if plan.problems:
        raise DataError("\n".join(["the data cannot feed this run:", *plan.problems]))
