"""Build the engine of a run, without values at first, and give it its first weights."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterBase
from cpt.checkpoint.loading import flat_ranges
from cpt.checkpoint.starting_model import StartingCheckpoint
from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.deepspeed_adapter.partition import materialize_partitioned
from cpt.deepspeed_adapter.shards import publish_master_weights
from cpt.errors import ConfigError
from cpt.model import attention, gpt_oss
from cpt.model.adapters.attach import attach_adapters
from cpt.model.adapters.initial_values import WithInitialAdapters
from cpt.model.adapters.layout import adapted_matrices, adapter_summary, is_adapter_name
from cpt.model.attention import Attention
from cpt.model.attention.probe import run_probe
from cpt.model.experts.packed_base import fill_packed, materialize_packed, pack
from cpt.model.freezing import freeze
from cpt.model.missing_model import is_checkpoint
from cpt.model.parameters import parameter_shapes
from cpt.model.products.choice import choose_products, products_summary
from cpt.model.products.layers import ChosenProducts, eight_bit_matrices, put_products
from cpt.model.products.probe import run_probe as run_products_probe
from cpt.model.weights.checksums import damaged, known_sums
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import WeightSource, fill_parts
from cpt.parallel.agreement import gather_json, together
from cpt.parallel.division import divide_among_all
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology
from cpt.parallel.ulysses import Ulysses
from cpt.resilience.phase import PhaseClock
from cpt.storage.local_copies import local_copy
from cpt.training.engine import TrainingEngine

log = logging.getLogger("cpt.job.engine_setup")

MASTER = "master/"
"""Prefix of fp32 weights among the ranges of a checkpoint."""


def build_engine(
    config: RunConfig, model_config: GptOssConfig, topology: Topology, clock: PhaseClock
) -> TrainingEngine:
    """Build and patch the model on the meta device, allocate it, and wrap it in an engine.

    Its weights have no values yet: see `fill_weights`.

    Raises:
        ConfigError: the attention backend or `train.products` cannot do this here, or computes
            something else than its definition.
    """
    kernel = choose_attention(config, model_config, topology)
    exchange = make_exchange(config, window_tokens(model_config), topology)
    probe_attention(kernel, exchange, config.dtype, model_config, topology)
    products = agreed_products(config, model_config, topology)
    model = gpt_oss.skeleton(model_config, config.dtype)
    report = gpt_oss.patch(
        model, topology, experts_in_halves=config.model.expert_overlap == "halves"
    )
    is_packed = config.adapter.base == "mxfp4"
    if is_packed:
        num_packed = pack(model)
        log.info("packed: %d expert matrices stay in MXFP4", num_packed)
    if config.adapter.is_on:
        adapted = adapted_matrices(config.adapter, model_config)
        attach_adapters(model, adapted, config.adapter.scale, topology.ep_size)
        log.info("adapter: %s", adapter_summary(config.adapter, model_config))
    if products is not None:
        put_products(model, products)
        log.info("products: %s", products_summary(products))
    if config.zero_stage == 3:
        materialize_partitioned(model, config.engine_json, config.dtype)
        gpt_oss.restore_rotary_frequencies(model, topology.device)
    else:
        gpt_oss.materialize(model, topology.device)
    if is_packed:
        materialize_packed(model, topology.device)
    log.info("patched: %s", report)
    if config.train.freeze:
        num_frozen = freeze(model, config.train.freeze)
        log.info("frozen: %d tensors (%s)", num_frozen, ", ".join(config.train.freeze))
    return TrainingEngine(model, config, topology, kernel, exchange, clock)


def choose_attention(
    config: RunConfig, model_config: GptOssConfig, topology: Topology
) -> Attention:
    """Return the attention backend of a run.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    try:
        return attention.choose(
            config.model.attention,
            device=topology.device,
            dtype=config.dtype,
            head_dim=model_config.head_dim,
        )
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from error


def make_exchange(config: RunConfig, window: int, topology: Topology) -> Ulysses | None:
    """Return how ranks that share a row exchange around attention; None if none do."""
    if topology.sp_size == 1:
        return None
    halo = WindowHalo(topology, window) if config.use_halo else None
    return Ulysses(topology, halo, config.model.ulysses_groups)


def probe_attention(
    kernel: Attention,
    exchange: Ulysses | None,
    dtype: torch.dtype,
    model_config: GptOssConfig,
    topology: Topology,
) -> None:
    """Compare the attention of this run, exchange included, with its definition.

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
    error = report.largest_error
    log.info("attention agrees with its definition: largest relative error %.1e", error)


def agreed_products(
    config: RunConfig, model_config: GptOssConfig, topology: Topology
) -> ChosenProducts | None:
    """Return how the run computes its 8-bit products, after a probe; None if it has none.

    Raises:
        ConfigError: on all ranks: one cannot or is wrong, or they would not all compute alike.
    """
    group = topology.control_group
    section = config.train.products
    if not section.is_on:
        return None
    choose = partial(choose_products, section, model_config, topology.device, config.dtype)
    chosen = together(group, choose)
    assert chosen is not None
    summaries = gather_json(products_summary(chosen), group)
    for rank, summary in enumerate(summaries):
        if summary != summaries[0]:
            raise ConfigError(
                f"train.products: rank 0 would compute {summaries[0]}, rank {rank} {summary}. "
                "Give all ranks the same GPUs and software, or remove train.products."
            )
    matrices = eight_bit_matrices(section, model_config)
    probe = partial(run_products_probe, chosen, matrices, topology.device, config.dtype)
    findings = together(group, probe)
    error = max(finding.to_definition for finding in findings)
    log.info("8-bit products agree with their definition: largest relative error %.1e", error)
    return chosen


def weight_source(
    config: RunConfig, model_config: GptOssConfig, topology: Topology
) -> WeightSource:
    """Return where the first weights come from; the files of a directory are opened.

    Raises:
        ConfigError: on all ranks: the directory does not hold this model.
    """
    path = config.model.path
    if path is None:
        return RandomWeights(config.train.seed, float(model_config.initializer_range))
    return stored_weights(path, model_config, topology)


def stored_weights(path: Path, model_config: GptOssConfig, topology: Topology) -> WeightSource:
    """Return the weights of a directory, or of a checkpoint of another run; its files are opened.

    Raises:
        ConfigError: on all ranks: the directory does not hold this model.
        CheckpointError: on all ranks: the checkpoint is damaged, or of another model.
    """
    shapes = parameter_shapes(model_config)

    def opened() -> WeightSource:
        if is_checkpoint(path):
            return StartingCheckpoint(path, shapes)
        return DirectoryWeights(local_copy(path), shapes)

    return together(topology.control_group, opened)


def base_of(config: RunConfig, model_config: GptOssConfig) -> AdapterBase:
    """Return the model that a run starts from, below an adapter too; samples of it are read.

    Raises:
        ConfigError: the directory holds no weights that can be read.
    """
    return AdapterBase.of(config.model.path, config.train.seed, model_config)


def verify_checksums(source: WeightSource, topology: Topology) -> None:
    """Hash the weight files, each on one rank, and refuse damaged ones.

    Raises:
        ConfigError: on all ranks, naming every file whose SHA-256 is not the known one.
        CheckpointError: on all ranks: a file of a checkpoint is not the one that was written.
    """
    if isinstance(source, StartingCheckpoint):
        num_files = source.verify(topology)
        log.info("weights: %d files of %s verified", num_files, source.folder)
    if not isinstance(source, DirectoryWeights):
        return
    group = topology.control_group
    sums = together(group, lambda: known_sums(source.path, source.files))
    if not sums:
        log.info("weights: no SHA256SUMS in %s, files are read as they are", source.path)
        return
    sizes = {file: file.stat().st_size for file in sums}
    mine = divide_among_all(sizes, topology.world_size)[topology.rank]
    problems = []
    for found in gather_json(together(group, lambda: damaged(sums, mine)), group):
        problems += found
    if problems:
        raise ConfigError(problems)
    log.info("weights: SHA-256 of %d files of %d verified", len(sums), len(source.files))


def fill_weights(
    engine: TrainingEngine, source: WeightSource, *, below_adapter: bool = False
) -> None:
    """Give the engine its first weights, and the packed ones that stay as they are.

    Every rank reads or draws its own part, in fp32 where the source has fp32.

    Args:
        engine: The engine.
        source: Weights of the model.
        below_adapter: Leave the adapter as it is.

    Raises:
        StorageError: on all ranks, if one could not read.
        ConfigError: on all ranks: values are not finite, tensors hold only zeros, or experts that
            stay packed are not MXFP4.
    """
    topology = engine.topology
    engine.deepspeed.state_reading.wait()
    adapted = adapted_matrices(engine.adapter, engine.model_config)
    with_adapters = WithInitialAdapters(source, adapted, engine.seed, engine.dtype)
    targets = {}
    for key, part in flat_ranges(engine.deepspeed, topology).items():
        name = key.removeprefix(MASTER)
        if key.startswith(MASTER) and not (below_adapter and is_adapter_name(name)):
            targets[name] = (part.tensor, part.offset)
    together(topology.control_group, lambda: fill_parts(targets, with_adapters))
    _fill_packed(engine, source)
    if isinstance(source, DirectoryWeights):
        source.refuse_unusable(gather_json(source.seen_json(), topology.control_group))
    publish_master_weights(engine.deepspeed)


def _fill_packed(engine: TrainingEngine, source: WeightSource) -> None:
    """Read the packed expert matrices of this rank, if there are any.

    Raises:
        StorageError: on all ranks, if one could not read.
        ConfigError: on all ranks: the source has values that MXFP4 does not have.
    """
    if engine.adapter.base != "mxfp4":
        return
    assert isinstance(source, DirectoryWeights), "the gate lets packed experts come from files only"
    together(engine.topology.control_group, lambda: fill_packed(engine.deepspeed.module, source))
