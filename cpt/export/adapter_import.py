"""A PEFT directory as the checkpoint of step 0, from which a run goes on.

    adapter_config.json -> compared with the `adapter` section of the run
    adapter_model.safetensors -> our names and order -> checkpoint step-00000000

Decisions
    The run YAML says what the adapter is; the directory has to agree.  Nothing is taken over from
    it, so that the run is described in one place.
    Only safetensors are read, and of adapter_config.json only values that are compared.
    The checkpoint has no moments: Adam begins anew.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState
from cpt.checkpoint.manifest import TensorRecord
from cpt.checkpoint.reader import list_steps
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.writer import write_alone
from cpt.config.adapter_section import AdapterSection
from cpt.errors import ConfigError
from cpt.export.adapter import BASE_FILE
from cpt.model.adapters.layout import AdaptedMatrix, adapted_matrices, adapter_problems
from cpt.model.adapters.peft_files import PeftTensor, is_end_of, peft_tensors, value_for
from cpt.model.weights.byte_ranges import TORCH_DTYPES, TensorFile
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, ADAPTER_FILE, open_tensors, read_json
from data_pipeline.escaping import escaped_line

log = logging.getLogger("cpt.export.adapter_import")

PICKLE = "adapter_model.bin"
MOST_NAMED = 5
"""Problems of one kind that a message tells."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the base as well (the beginning counts)."""
REFUSED_KEYS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Keys of adapter_config.json with which an adapter is more, or something else, than W + s B A."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """What is imported, and for which run."""

    source: Path
    """A PEFT directory."""
    run_dir: Path
    """The run directory that gets the checkpoint."""
    section: AdapterSection
    """The `adapter` section of the run."""
    base_path: Path | None
    """`model.path` of the run (`starting_model.located`); None for random weights."""
    seed: int
    """`train.seed` of the run."""
    dtype: str
    """`train.dtype` of the run."""
    config: GptOssConfig
    """The model's configuration."""


def import_adapter(request: ImportRequest) -> Path:
    """Write the checkpoint of step 0, and return its folder.

    Raises:
        ConfigError: the directory holds no adapter, or another one than the run trains; all of it.
        StorageError: the checkpoint could not be written.
    """
    if not request.section.is_on:
        raise ConfigError(
            "adapter.kind is none: the run has no adapter. Give it an adapter section with kind: "
            "lora or dora."
        )
    steps = list_steps(request.run_dir)
    if steps:
        raise ConfigError(
            f"{request.run_dir} has checkpoints already, such as that of step {steps[0]}. Give a "
            "new --run_dir."
        )
    if (request.run_dir / "guard").exists():
        raise ConfigError(
            f"{request.run_dir} has measurements of the guard already (guard/), which are of other "
            "first weights. Give a new --run_dir."
        )
    wrong = adapter_problems(request.section, request.config)
    if wrong:
        raise ConfigError(wrong)
    matrices = adapted_matrices(request.section, request.config)
    tensors = peft_tensors(matrices, request.config.num_local_experts)
    base = AdapterBase.of(request.base_path, request.seed, request.config)
    settings = _read_settings(request.source)
    problems = _config_problems(settings, request.section, matrices)
    problems += _file_problems(request.source / ADAPTER_FILE, tensors)
    problems += _base_problems(request.source, settings, base)
    if problems:
        raise ConfigError([f"{request.source}: {problem}" for problem in problems])
    values, records = _read_tensors(request.source / ADAPTER_FILE, tensors)
    state = RunState(
        model_config=request.config.to_dict(),
        lineage=[{"name": base.name}],
        adapter=AdapterState(
            section=request.section, base=base, dtype=request.dtype, imported=True
        ).to_json(),
    )
    return write_alone(request.run_dir, 0, values, records, state.to_json())


def _read_settings(source: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        ConfigError: the directory has none, or its tensors are pickled.
    """
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder.")
    if not (source / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{source}: holds no {ADAPTER_CONFIG}. Give the directory that PEFT's save_pretrained "
            "wrote."
        )
    if not (source / ADAPTER_FILE).is_file():
        pickled = ""
        if (source / PICKLE).exists():
            pickled = (
                f" {PICKLE} is a pickle, which can run code and is not read: save it again with "
                "safe_serialization=True."
            )
        raise ConfigError(f"{source}: holds no {ADAPTER_FILE}.{pickled}")
    return read_json(source / ADAPTER_CONFIG)


def _config_problems(
    settings: Mapping[str, Any], section: AdapterSection, matrices: Sequence[AdaptedMatrix]
) -> list[str]:
    """Return in what adapter_config.json says something else than the run."""
    problems = []
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {_shown(kind)}, must be LORA."]
    for key in REFUSED_KEYS:
        if settings.get(key):
            problems.append(f"{key} is {_shown(settings[key])}, which is not supported here.")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {_shown(settings['bias'])}, must be none: biases stay frozen.")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {_shown(start)}: such an adapter belongs to a changed base. "
            "Convert it with PEFT (path_initial_model_for_weight_conversion) and import the result."
        )
    wanted = "dora" if settings.get("use_dora") else "lora"
    if wanted != section.kind:
        problems.append(
            f"use_dora is {_shown(settings.get('use_dora'))}, but adapter.kind is {section.kind}. "
            f"Give adapter.kind: {wanted}."
        )
    return problems + _scale_problems(settings, section, matrices)


def _scale_problems(
    settings: Mapping[str, Any], section: AdapterSection, matrices: Sequence[AdaptedMatrix]
) -> list[str]:
    """Return which ranks and scales, as PEFT takes them, are not those of the run."""
    problems = []
    names = [matrix.name for matrix in matrices]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict):
            return [f"{key} is {_shown(patterns)}, must be an object."]
        for pattern in patterns:
            if not any(is_end_of(pattern, name) for name in names):
                problems.append(
                    f"{key} has '{escaped_line(pattern, 80)}', which is no end of the name of a "
                    "matrix that this run adapts."
                )
    ranks: dict[Any, str] = {}
    scales: dict[float, str] = {}
    for matrix in matrices:
        rank = value_for(settings.get("rank_pattern") or {}, matrix.name, settings.get("r"))
        alpha = value_for(
            settings.get("alpha_pattern") or {}, matrix.name, settings.get("lora_alpha")
        )
        if type(rank) is not int or rank < 1 or not _is_number(alpha):
            return [*problems, f"{matrix.name} has rank {_shown(rank)} and alpha {_shown(alpha)}."]
        if rank != matrix.rank:
            ranks.setdefault((rank, matrix.rank), matrix.name)
        scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        scales.setdefault(round(scale, 9), matrix.name)
    for (rank, own), name in ranks.items():
        key = "expert_rank" if ".experts." in name else "rank"
        problems.append(f"{name} has rank {rank}, this run has {own}. Give adapter.{key}: {rank}.")
    return problems + _one_scale_problems(scales, section)


def _one_scale_problems(scales: Mapping[float, str], section: AdapterSection) -> list[str]:
    """Return what is wrong with the scales, each of which is given with a matrix that has it."""
    if len(scales) > 1:
        told = ", ".join(f"{scale:g} ({name})" for scale, name in list(scales.items())[:MOST_NAMED])
        return [
            f"its matrices have different scales alpha / rank: {told}. A run has one scale for all "
            "of them. Merge it into the model instead, or train it anew."
        ]
    for scale in scales:
        if not math.isclose(scale, section.scale, rel_tol=1e-6):
            return [
                f"its scale alpha / rank is {scale:g}, that of this run is {section.alpha:g} / "
                f"{section.rank} = {section.scale:g}. Give adapter.alpha: "
                f"{scale * section.rank:g}."
            ]
    return []


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(float(value))  # type: ignore[arg-type]


def _file_problems(file: Path, tensors: Sequence[PeftTensor]) -> list[str]:
    """Return which tensors are missing, unknown, misshapen, or not of numbers.

    Raises:
        ConfigError: the file is no whole safetensors file.
    """
    wanted = {tensor.name: tensor for tensor in tensors}
    missing = []
    unknown = []
    misshapen = []
    with open_tensors(file) as opened:
        found = set(opened.keys())
        for name in sorted(wanted.keys() - found):
            missing.append(f"tensor '{name}' is missing.")
        for name in sorted(found - wanted.keys()):
            unknown.append(f"tensor '{escaped_line(name, 200)}' is not of this run's adapter.")
        for name in sorted(found & wanted.keys()):
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            if shape != wanted[name].shape:
                misshapen.append(
                    f"tensor '{name}' has shape {shape}, expected {wanted[name].shape}."
                )
            dtype = TORCH_DTYPES.get(stored.get_dtype())
            if dtype is None or not dtype.is_floating_point:
                misshapen.append(f"tensor '{name}' has dtype {stored.get_dtype()}.")
    problems = []
    for some in (missing, unknown, misshapen):
        problems += some[:MOST_NAMED]
        if len(some) > MOST_NAMED:
            problems.append(f"{len(some) - MOST_NAMED} more of these.")
    if missing or unknown:
        problems.append(
            "Set adapter.targets and adapter.layers to what was adapted: an import needs the same "
            "matrices."
        )
    return problems


def _base_problems(source: Path, settings: Mapping[str, Any], base: AdapterBase) -> list[str]:
    """Return a problem if the adapter is known to be of another base; warn if its name differs."""
    if (source / BASE_FILE).is_file():
        told = read_json(source / BASE_FILE)
        known = told.get("hash")
        if not base.is_known_as(known, told.get("sums")):
            return [
                f"it is an adapter of another base: that of {_shown(told.get('base'))} has the "
                f"hash {_shown(known)}, {base.name} has {base.told}. Give the base that it was "
                "trained on as model.path."
            ]
        return []
    name = settings.get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).name != base.name:
        log.warning(
            "%s is an adapter of '%s', and model.path is '%s': nothing tells whether their weights "
            "are the same.",
            source,
            escaped_line(name, 200),
            base.name,
        )
    return []


def _read_tensors(
    file: Path, tensors: Sequence[PeftTensor]
) -> tuple[dict[str, torch.Tensor], dict[str, TensorRecord]]:
    """Return our tensors in fp32 by key of a checkpoint, and their records.

    Raises:
        ConfigError: values are not finite, or experts that are to share an adapter do not.
    """
    opened = TensorFile(file)
    values = {}
    records = {}
    problems = []
    for tensor in tensors:
        flat = opened.elements(tensor.name, 0, math.prod(tensor.shape))
        if not bool(torch.isfinite(flat).all()):
            problems.append(f"{file}: tensor '{tensor.name}' holds values that are not finite.")
            continue
        try:
            value = tensor.from_peft(flat.float().view(tensor.shape))
        except ValueError as error:
            problems.append(f"{file}: {error}. Give adapter.share_experts: false.")
            continue
        values[f"master/{tensor.own_name}"] = value
        records[tensor.own_name] = TensorRecord(
            shape=tensor.own_shape, dtype="float32", trained=False
        )
    if problems:
        raise ConfigError(problems[:MOST_NAMED])
    return values, records


def _shown(value: object) -> str:
    return escaped_line(repr(value), 80)
