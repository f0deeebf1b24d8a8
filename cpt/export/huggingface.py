"""The export of a checkpoint as a Hugging Face directory that transformers loads on its own.

    stored fp32 pieces -> bf16, fp32, or MXFP4 codes -> weight files -> the other files -> rename

The checkpoint of an adapter is exported as the model that it makes: its base with the adapter
added, in fp32.

Tensors are read and written in pieces, so that memory holds a few of them whatever the size of the
model; neither an engine nor a process group is needed. The directory appears under its name once it
is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from cpt.checkpoint.manifest import Manifest, read_manifest, verify_files
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.model_weights import adapter_of, merged_weights, whole_expert_pieces
from cpt.checkpoint.weights import stored_pieces
from cpt.errors import CheckpointError, ConfigError
from cpt.export.exponent_choice import ExponentChoice, choose_exponent
from cpt.export.mxfp4_report import REPORT_FILE
from cpt.export.quantized_export import QuantizedExport, quantized_entries
from cpt.export.reader_forms import exported_config, generation_config
from cpt.export.tokenizer import save_tokenizer
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.writer import (
    DirectoryWriter,
    Entry,
    check_weights_space,
    published,
    refuse_existing,
)
from cpt.resilience.faults import fault_point
from data_pipeline.console.progress import show_progress
from data_pipeline.store.files import AtChunk, no_call, write_json

DTYPES = {"bf16": torch.bfloat16, "mxfp4": torch.bfloat16, "fp32": torch.float32}
"""Dtype of everything that is not quantized, by format."""
QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""Part of config.json, as in the released model."""
MAX_PROBLEMS = 5
"""Tensors that a refusal names."""

CompleteDirectory = Callable[[Path], None]
"""Adds files to a directory that is about to be published."""


Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor of the model by name."""
WeightPieces = Iterable[tuple[str, int, torch.Tensor]]
"""(name, first element, 1-D fp32 values) of all tensors."""


def export_checkpoint(
    folder: Path,
    out: Path,
    format_name: str,
    complete: CompleteDirectory | None = None,
    base: Path | None = None,
    choice: ExponentChoice | None = None,
    at_chunk: AtChunk = no_call,
) -> Path:
    """Write the weights of a checkpoint as a Hugging Face directory.

    Args:
        folder: The checkpoint.
        out: The new directory.
        format_name: `bf16`; `mxfp4` (expert matrices rounded to the released layout, the rest in
            bf16, with a report of what that does to every tensor); or `fp32` (the master weights).
        complete: Called with the directory when only its publication is left.
        base: The model below an adapter, or to compare an `mxfp4` export with; None for where the
            run started from.
        choice: The rule of `mxfp4`; None for that of training, or the default.
        at_chunk: Called after each chunk that is hashed or written.

    Returns:
        `out`.

    Raises:
        ConfigError: the format is unknown, `out` exists, or the base of an adapter is not there or
            is another model; or the given base cannot be compared with.
        StorageError: the directory could not be written; nothing is left behind.
        CheckpointError: the checkpoint is damaged, or lacks a tensor of its model, or holds values
            that MXFP4 does not have.
    """
    if format_name not in DTYPES:
        raise ConfigError(f"--format {format_name} is not one of: {', '.join(DTYPES)}.")
    refuse_existing(out)  # before the checkpoint is hashed, which takes minutes
    manifest = read_manifest(folder)
    config = model_config_of(manifest)
    shapes = parameter_shapes(config)
    adapter = adapter_of(folder, manifest)
    source = None
    if adapter is None:
        _check_tensors(folder, manifest, shapes)
    else:
        source = merged_weights(folder, manifest, adapter, torch.float32, base)
    entries = _entries(shapes, format_name)
    quantized = None
    if format_name == "mxfp4":
        rule = choice or choose_exponent(manifest, None)
        quantized = QuantizedExport(folder, manifest, rule, base)
    verify_files(folder, manifest, at_chunk)
    with published(out) as temporary:
        check_weights_space(temporary, sum(entry.num_bytes for entry in entries.values()))
        pieces: WeightPieces = stored_pieces(folder, manifest)
        if source is not None:
            pieces = whole_expert_pieces(source, source.shapes)
        shown = _with_progress(pieces, shapes, f"export of {folder.name}")
        with DirectoryWriter(temporary, entries, at_chunk) as writer:
            _write_weights(shown, shapes, writer, entries, quantized)
        fault_point("export", manifest.step)
        if source is not None:
            source.refuse_unusable()
        if quantized is not None:
            _write_json(temporary / REPORT_FILE, quantized.report(folder.name))
        _write_other_files(temporary, config, format_name)
        if complete is not None:
            complete(temporary)
    return out


def _check_tensors(folder: Path, manifest: Manifest, expected: Shapes) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors of its model, in their shapes."""
    stored = manifest.tensors
    problems = []
    for name in sorted(expected.keys() - stored.keys()):
        problems.append(f"tensor '{name}' is missing.")
    for name in sorted(stored.keys() - expected.keys()):
        problems.append(f"tensor '{name}' is unknown to its model.")
    for name in sorted(expected.keys() & stored.keys()):
        shape = stored[name].shape
        if shape != expected[name]:
            problems.append(f"tensor '{name}' has shape {shape}, expected {expected[name]}.")
    if problems:
        shown = " ".join(problems[:MAX_PROBLEMS])
        raise CheckpointError(f"{folder.name} is not exported: {shown}")


def _entries(shapes: Shapes, format_name: str) -> dict[str, Entry]:
    """Return everything that the weight files will hold, in order of writing."""
    if format_name == "mxfp4":
        return quantized_entries(shapes)
    dtype = DTYPES[format_name]
    return {name: Entry(shape=shape, dtype=dtype) for name, shape in sorted(shapes.items())}


def _with_progress(pieces: WeightPieces, shapes: Shapes, title: str) -> WeightPieces:
    """Yield pieces and show how many of all values went by."""
    total = sum(math.prod(shape) for shape in shapes.values())
    with show_progress(total, title, "value", unit_scale=True) as bar:
        for name, start, values in pieces:
            bar.update(values.numel())
            yield name, start, values


def _write_weights(
    pieces: WeightPieces,
    shapes: Shapes,
    writer: DirectoryWriter,
    entries: dict[str, Entry],
    quantized: QuantizedExport | None,
) -> None:
    """Write all weights; what has no entry of its own name is rounded."""
    for name, start, values in pieces:
        if quantized is not None and name not in entries:
            _, inputs, rows = shapes[name]
            experts = values.view(-1, inputs, rows)
            quantized.write(writer, name, start // (inputs * rows), experts)
            continue
        stored = values.to(entries[name].dtype)
        if quantized is not None:
            quantized.look(name, stored)
        writer.write(name, start, stored)


def _write_other_files(out: Path, config: GptOssConfig, format_name: str) -> None:
    dtype = str(DTYPES[format_name]).removeprefix("torch.")
    values = exported_config(config, dtype)
    if format_name == "mxfp4":
        values["quantization_config"] = QUANTIZATION_CONFIG
    _write_json(out / "config.json", values)
    _write_json(out / "generation_config.json", generation_config(values))
    save_tokenizer(out, config.max_position_embeddings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_json(path, content, indent=2, sort_keys=True)
