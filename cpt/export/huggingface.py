"""A checkpoint -> a Hugging Face directory that transformers loads with no code of this project.

    stored fp32 pieces -> bf16, fp32, or MXFP4 codes -> weight files -> the other files -> rename

Tensors are read and written in pieces, so memory stays at a few of them whatever the model; no
engine and no process group is needed.  The directory appears under its name when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from cpt.checkpoint.manifest import Manifest, read_manifest, verify_files
from cpt.checkpoint.weights import stored_pieces
from cpt.errors import CheckpointError, ConfigError
from cpt.export.quantization_error import ErrorOfTensor, quantisation_report
from cpt.export.tokenizer import save_tokenizer
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, is_expert_matrix
from cpt.model.weights.writer import (
    DirectoryWriter,
    Entry,
    check_space,
    published,
    refuse_existing,
)
from cpt.resilience.faults import fault_point
from data_pipeline.store.files import write_json
from data_pipeline.text.harmony import STOP_IDS

DTYPES = {"bf16": torch.bfloat16, "mxfp4": torch.bfloat16, "fp32": torch.float32}
"""Dtype of what is not quantised, by format."""
QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""As in the released config.json."""
REPORT_FILE = "mxfp4_report.json"

Complete = Callable[[Path], None]
"""Adds files to a directory that is about to be published."""


def export_checkpoint(
    folder: Path, out: Path, format_name: str, complete: Complete | None = None
) -> Path:
    """Write the weights of a checkpoint as a Hugging Face directory.

    Args:
        folder: A checkpoint.
        out: Must not exist.
        format_name: `bf16`, `mxfp4` (expert matrices rounded to the released layout, the rest bf16;
            with a report of the error of every tensor), or `fp32` (the master weights).
        complete: Called with the directory when only its publication is left.

    Returns:
        `out`.

    Raises:
        ConfigError: unknown format, or `out` exists.
        StorageError: it could not be written; nothing is left behind.
        CheckpointError: the checkpoint is not whole, or does not hold every tensor of its model.
    """
    if format_name not in DTYPES:
        raise ConfigError(f"--format {format_name} is not one of: {', '.join(DTYPES)}.")
    refuse_existing(out)  # hashing a large checkpoint takes minutes
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    _check_keys(folder, manifest)
    with published(out) as temporary:
        entries = _entries(manifest, format_name)
        check_space(temporary, sum(entry.num_bytes for entry in entries.values()))
        errors = _write_weights(folder, manifest, temporary, entries)
        if format_name == "mxfp4":
            write_json(
                temporary / REPORT_FILE, quantisation_report(errors), indent=2, sort_keys=True
            )
        _write_other_files(temporary, manifest.state["model_config"], format_name)
        if complete is not None:
            complete(temporary)
    return out


def _check_keys(folder: Path, manifest: Manifest) -> None:
    """The checkpoint must hold the tensors of its model, no more and no less, in their shapes."""
    expected = parameter_shapes(GptOssConfig(**manifest.state["model_config"]))
    stored = {name: record.shape for name, record in manifest.tensors.items()}
    problems = [f"tensor '{name}' is missing." for name in sorted(expected.keys() - stored.keys())]
    problems += [
        f"tensor '{name}' is unknown to its model."
        for name in sorted(stored.keys() - expected.keys())
    ]
    problems += [
        f"tensor '{name}' has shape {stored[name]}, expected {expected[name]}."
        for name in sorted(expected.keys() & stored.keys())
        if stored[name] != expected[name]
    ]
    if problems:
        raise CheckpointError(f"{folder.name} is not exported: " + " ".join(problems[:5]))


def _entries(manifest: Manifest, format_name: str) -> dict[str, Entry]:
    """What the directory will hold, in order of writing."""
    dtype = DTYPES[format_name]
    entries: dict[str, Entry] = {}
    for name, record in sorted(manifest.tensors.items()):
        if format_name == "mxfp4" and is_expert_matrix(name, record.shape):
            experts, inputs, rows = record.shape
            if inputs % mxfp4.BLOCK:
                raise ConfigError(
                    f"{name} has {inputs} inputs; MXFP4 needs a multiple of {mxfp4.BLOCK}. Use bf16."
                )
            blocks = (experts, rows, inputs // mxfp4.BLOCK)
            entries[name + BLOCKS] = Entry(shape=(*blocks, mxfp4.BLOCK // 2), dtype=torch.uint8)
            entries[name + SCALES] = Entry(shape=blocks, dtype=torch.uint8)
        else:
            entries[name] = Entry(shape=record.shape, dtype=dtype)
    return entries


def _write_weights(
    folder: Path, manifest: Manifest, out: Path, entries: dict[str, Entry]
) -> dict[str, ErrorOfTensor]:
    """Write all pieces; of quantised tensors the error is returned."""
    errors: dict[str, ErrorOfTensor] = {}
    with DirectoryWriter(out, entries) as writer:
        for name, start, values in stored_pieces(folder, manifest.tensors):
            if name in entries:
                writer.write(name, start, values.to(entries[name].dtype))
                continue
            _, inputs, rows = manifest.tensors[name].shape
            first = start // (inputs * rows)
            for index, expert in enumerate(values.view(-1, inputs, rows), start=first):
                rounded = expert.unsqueeze(0).to(torch.bfloat16)
                blocks, scales = mxfp4.encode(rounded)
                writer.write(name + BLOCKS, index * blocks.numel(), blocks)
                writer.write(name + SCALES, index * scales.numel(), scales)
                errors.setdefault(name, ErrorOfTensor()).add(rounded, mxfp4.decode(blocks, scales))
        fault_point("export", manifest.step)
    return errors


def _write_other_files(out: Path, model_config: dict[str, Any], format_name: str) -> None:
    config = _config_json(model_config, DTYPES[format_name])
    if format_name == "mxfp4":
        config["quantization_config"] = QUANTIZATION_CONFIG
    write_json(out / "config.json", config, indent=2, sort_keys=True)
    generation = _generation_json(model_config)
    write_json(out / "generation_config.json", generation, indent=2, sort_keys=True)
    save_tokenizer(out, model_config["max_position_embeddings"])


def _config_json(model_config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "torch_dtype")
    kept = {key: value for key, value in model_config.items() if key not in dropped}
    return {
        **kept,
        "architectures": ["GptOssForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }


def _generation_json(model_config: dict[str, Any]) -> dict[str, Any]:
    """End of text, end of a turn and a tool call all end a generation."""
    return {
        "bos_token_id": model_config["bos_token_id"],
        "eos_token_id": list(STOP_IDS),
        "pad_token_id": model_config["pad_token_id"],
        "do_sample": True,
    }
