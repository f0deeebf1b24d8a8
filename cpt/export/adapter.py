"""The export of an adapter's checkpoint as a directory that PEFT loads.

    adapter_model.safetensors   the adapter (cpt/model/adapters/peft_files.py)
    adapter_config.json         ranks and scale, in PEFT's words
    adapter_base.json           the base that it was trained on, with a hash of its weights, and
                                what vLLM does not take
    README.md, SHA256SUMS       the model card, and how to load the files

Nothing is rounded but the adapter itself, to the dtype that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState
from cpt.checkpoint.manifest import Manifest, read_manifest, verify_files
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.model_weights import adapter_of
from cpt.checkpoint.weights import CheckpointWeights
from cpt.config.sections import DTYPES
from cpt.errors import ConfigError
from cpt.export.huggingface import CompleteDirectory
from cpt.model.adapters.layout import EXPERTS, AdaptedMatrix, adapted_matrices
from cpt.model.adapters.peft_files import PeftTensor, adapter_config, peft_tensors
from cpt.model.missing_model import run_of
from cpt.model.weights.checksums import write_sums
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, ADAPTER_FILE, holds_blocks
from cpt.model.weights.source import read_window
from cpt.model.weights.writer import (
    Entry,
    TensorFileWriter,
    check_weights_space,
    published,
    refuse_existing,
)
from cpt.resilience.faults import fault_point
from data_pipeline.store.files import write_json

BASE_FILE = "adapter_base.json"
"""Tells on which base an adapter was trained; PEFT does not read it, `cpt import-adapter` does."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`."""
VLLM_DEFAULT_RANK = 16


def export_adapter(
    folder: Path, out: Path, dtype_name: str, complete: CompleteDirectory | None = None
) -> Path:
    """Write the adapter of a checkpoint in PEFT's format.

    Args:
        folder: The checkpoint.
        out: The new directory.
        dtype_name: `bf16` or `fp32`, the dtype of the file.
        complete: Called with the directory when only its publication is left.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` exists, or the checkpoint holds a whole model.
        StorageError: the directory could not be written; nothing is left behind.
        CheckpointError: the checkpoint is damaged, or lacks a tensor of the adapter.
    """
    refuse_existing(out)
    manifest = read_manifest(folder)
    state = require_adapter(folder, manifest)
    verify_files(folder, manifest)
    matrices, tensors = _contents(manifest, state)
    dtype = DTYPES[dtype_name]
    entries = {tensor.name: Entry(shape=tensor.shape, dtype=dtype) for tensor in tensors}
    config = model_config_of(manifest)
    with published(out) as temporary:
        check_weights_space(temporary, sum(entry.num_bytes for entry in entries.values()))
        weights = CheckpointWeights(folder, manifest, torch.float32)
        _write_tensors(temporary / ADAPTER_FILE, tensors, entries, weights)
        fault_point("export", manifest.step)
        values = adapter_config(
            matrices,
            state.section.scale,
            num_layers=config.num_hidden_layers,
            base_name=_loadable_name(state.base),
        )
        write_json(temporary / ADAPTER_CONFIG, values, indent=2, sort_keys=True)
        about: dict[str, object] = {"base": state.base.name, "hash": state.base.hash}
        about["sums"] = state.base.sums
        about["vllm"] = vllm_notes(matrices)
        write_json(temporary / BASE_FILE, about, indent=2, sort_keys=True)
        write_sums(temporary, [ADAPTER_FILE])
        if complete is not None:
            complete(temporary)
    return out


def require_adapter(folder: Path, manifest: Manifest) -> AdapterState:
    """Return the adapter of a checkpoint.

    Raises:
        ConfigError: it holds a whole model.
        CheckpointError: see `adapter_of`.
    """
    state = adapter_of(folder, manifest)
    if state is None:
        raise ConfigError(
            f"--format peft: {folder.name} holds a whole model, not an adapter. Use bf16, fp32 or "
            "mxfp4."
        )
    return state


def _contents(
    manifest: Manifest, state: AdapterState
) -> tuple[list[AdaptedMatrix], list[PeftTensor]]:
    config = model_config_of(manifest)
    matrices = adapted_matrices(state.section, config)
    return matrices, peft_tensors(matrices, config.num_local_experts)


def _write_tensors(
    file: Path,
    tensors: Sequence[PeftTensor],
    entries: dict[str, Entry],
    weights: CheckpointWeights,
) -> None:
    """Write the file tensor by tensor."""
    writer = TensorFileWriter(file, entries)
    try:
        for tensor in tensors:
            numel = math.prod(tensor.own_shape)
            value = read_window(weights, tensor.own_name, 0, numel).view(tensor.own_shape)
            writer.write(tensor.name, 0, tensor.to_peft(value).to(entries[tensor.name].dtype))
        writer.finish()
    finally:
        writer.close()


def vllm_notes(matrices: Sequence[AdaptedMatrix]) -> list[str]:
    """Return what vLLM does not take of an adapter, or needs to be told; what to do stands in each.

    Read in the sources of vLLM 0.18 to 0.26; not run here.
    """
    obstacles = _vllm_obstacles(matrices)
    rank = _largest_rank(matrices)
    if obstacles or rank <= VLLM_DEFAULT_RANK:
        return obstacles
    return [
        f"vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless told: this adapter has {rank}, so "
        f"start it with --max-lora-rank {_vllm_rank(rank)}."
    ]


def _vllm_obstacles(matrices: Sequence[AdaptedMatrix]) -> list[str]:
    """Return why vLLM cannot serve an adapter beside its base; none if it can."""
    found = []
    if any(matrix.has_magnitude for matrix in matrices):
        found.append(
            "vLLM does not load DoRA. Serve the merged model: cpt export --format bf16, or mxfp4."
        )
    alone = _experts_without_partner(matrices)
    if alone:
        found.append(
            f"vLLM wants adapters on both matrices of the experts of a layer or on neither; "
            f"{alone[0]} has one and its partner has none"
            + (f" (as {len(alone) - 1} more)" if len(alone) > 1 else "")
            + ". Train with adapter.targets that name experts, or serve the merged model."
        )
    rank = _largest_rank(matrices)
    if not found and rank > VLLM_RANKS[-1]:
        found.append(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}. Serve the merged "
            "model: cpt export --format bf16, or mxfp4."
        )
    return found


def _largest_rank(matrices: Sequence[AdaptedMatrix]) -> int:
    return max(matrix.rank for matrix in matrices)


def _vllm_rank(rank: int) -> int:
    """Return the smallest value of `--max-lora-rank` for a rank."""
    return next(size for size in VLLM_RANKS if size >= rank)


def _experts_without_partner(matrices: Sequence[AdaptedMatrix]) -> list[str]:
    """Return the expert matrices that are adapted while the other one of their layer is not."""
    adapted = {matrix.name for matrix in matrices if matrix.of_experts}
    alone = []
    for name in sorted(adapted):
        parent, _, last = name.rpartition(".")
        (partner,) = (other for other in EXPERTS if other != last)
        if f"{parent}.{partner}" not in adapted:
            alone.append(name)
    return alone


def _loadable_name(base: AdapterBase) -> str | None:
    """Return the name of the directory of a base; None if other programs cannot load it."""
    return None if base.path is None or base.in_checkpoint else base.name


def is_over_mxfp4(state: AdapterState, given: Path | None = None) -> bool:
    """Return whether an adapter was trained over MXFP4 weights, as far as can be told now.

    Args:
        state: The adapter.
        given: Where the base is now (`--base`); None for where it was in training.
    """
    path = given or (None if state.base.path is None else Path(state.base.path))
    return state.section.base == "mxfp4" or (path is not None and holds_blocks(path))


def _is_gone(base: AdapterBase) -> bool:
    """Return whether a directory is no longer where it was, so that nothing can be told of it."""
    return base.path is not None and not base.in_checkpoint and not Path(base.path).is_dir()


def _what_base_is(state: AdapterState) -> str:
    """Return what BASE stands for in the commands of a model card, and how to get it."""
    base = state.base
    if base.path is None:
        return f"BASE is a directory with the {base.name}."
    path = Path(base.path)
    run_dir = run_of(path)
    if run_dir is None:
        return f"BASE is the {state.dtype} export of the checkpoint `{base.name}`."
    step = int(path.name.removeprefix("step-"))
    command = f"cpt export --run_dir {run_dir.name} --step {step} --out BASE --format {state.dtype}"
    return f"BASE is the {state.dtype} export of `{run_dir.name}` at step {step}: `{command}`."


def serving_section(manifest: Manifest, state: AdapterState) -> str:
    """Return the part of the model card that says how to load the files."""
    matrices, _ = _contents(manifest, state)
    name = _loadable_name(state.base)
    base = name or "BASE"
    is_packed = is_over_mxfp4(state)
    lines = ["## Loading", ""]
    if name is None:
        lines += [_what_base_is(state), ""]
    lines += [
        "With PEFT, over the same base in bf16:",
        "",
        "```python",
        "from peft import PeftModel",
        *_loading_of_base(base, may_be_packed=is_packed or _is_gone(state.base)),
        'model = PeftModel.from_pretrained(model, "THIS_DIRECTORY")',
        "```",
        "",
        "PEFT warns that keys of `rank_pattern` match no module: they name parameters, and apply. "
        "It turns a bf16 adapter into fp32 unless `autocast_adapter_dtype=False` is given.",
        "",
    ]
    if not _vllm_obstacles(matrices):
        flag = _vllm_rank(_largest_rank(matrices))
        over = "the same base"
        if is_packed:
            over = "the MXFP4 weights that it was trained on, without rounding anything again"
        lines += [
            f"With vLLM, over {over}:",
            "",
            "```",
            f"vllm serve {base} --enable-lora --max-lora-rank {flag} "
            "--lora-modules NAME=THIS_DIRECTORY",
            "```",
            "",
        ]
    for note in vllm_notes(matrices):
        lines.append(f"- {note}")
    return "\n".join(lines).rstrip()


def _loading_of_base(base: str, *, may_be_packed: bool) -> list[str]:
    """Return the lines of Python that load a base in bf16."""
    if not may_be_packed:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="bfloat16")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, Mxfp4Config",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="bfloat16",',
        "    quantization_config=Mxfp4Config(dequantize=True))  # a base in MXFP4 only",
    ]
