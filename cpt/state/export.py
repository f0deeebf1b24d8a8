"""A checkpoint -> a Hugging Face directory that transformers loads with no code of this project.

Tensors are read and written in groups, so memory stays at one output file whatever the model; no engine and no
process group is needed.  The directory appears under its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cpt.errors import CheckpointError, ConfigError
from cpt.model import mxfp4
from cpt.model.hf_layout import BLOCKS, INDEX_FILE, SCALES, SINGLE_FILE, is_expert_name
from cpt.state.hf_tokenizer import save_tokenizer
from cpt.state.manifest import Manifest, read_manifest, verify_files
from cpt.state.stored import read_weights

DTYPES = {"bf16": torch.bfloat16, "mxfp4": torch.bfloat16, "fp32": torch.float32}
"""Dtype of what is not quantised, by format."""
LARGEST_FILE_BYTES = 4 * 2**30
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


def export_checkpoint(folder: Path, out: Path, format_name: str) -> Path:
    """Write the weights of a checkpoint as a Hugging Face directory.

    Args:
        folder: A checkpoint.
        out: Must not exist.
        format_name: `bf16`, `mxfp4` (expert matrices rounded to the released layout, the rest bf16), or `fp32` (the
            master weights).

    Returns:
        `out`.

    Raises:
        ConfigError: unknown format, or `out` exists.
        CheckpointError: the checkpoint is not whole.
    """
    if format_name not in DTYPES:
        raise ConfigError(f"--format {format_name} is not one of: {', '.join(DTYPES)}.")
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    if out.exists():
        raise ConfigError(f"{out} exists already and is not overwritten. Remove it or give another --out.")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = DTYPES[format_name]
    _write_weights(folder, manifest, temporary, dtype, quantise=format_name == "mxfp4")
    config = _config_json(manifest.state["model_config"], dtype)
    if format_name == "mxfp4":
        config["quantization_config"] = QUANTIZATION_CONFIG
    _write_json(temporary / "config.json", config)
    _write_json(temporary / "generation_config.json", _generation_json(manifest.state["model_config"]))
    save_tokenizer(temporary)
    temporary.rename(out)
    return out


def _write_weights(folder: Path, manifest: Manifest, out: Path, dtype: torch.dtype, *, quantise: bool) -> None:
    groups = list(_groups(manifest, dtype))
    names = (
        [SINGLE_FILE]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, group in zip(names, groups, strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for name, value in read_weights(folder, group, manifest).items():
            tensors |= _stored_form(name, value.to(dtype), quantise)
        save_file(tensors, str(out / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    written = {name.removesuffix(BLOCKS).removesuffix(SCALES) for name in weight_map}
    if written != manifest.tensors.keys():
        raise CheckpointError(f"{folder.name}: not every tensor reached the export.")
    if len(groups) > 1:
        _write_json(out / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _stored_form(name: str, value: torch.Tensor, quantise: bool) -> dict[str, torch.Tensor]:
    """A tensor as the format stores it."""
    if not (quantise and is_expert_name(name) and value.ndim == 3):
        return {name: value}
    if value.shape[1] % mxfp4.BLOCK:
        raise ConfigError(f"{name} has {value.shape[1]} inputs; MXFP4 needs a multiple of {mxfp4.BLOCK}. Use bf16.")
    encoded = [mxfp4.encode(expert.unsqueeze(0)) for expert in value]  # one at a time: it works in fp32
    blocks, scales = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return {name + BLOCKS: blocks, name + SCALES: scales}


def _groups(manifest: Manifest, dtype: torch.dtype) -> Iterator[list[str]]:
    """Names in sorted order, cut so that a file stays below the limit."""
    group: list[str] = []
    size = 0
    for name in sorted(manifest.tensors):
        num_bytes = torch.Size(manifest.tensors[name].shape).numel() * dtype.itemsize
        if group and size + num_bytes > LARGEST_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def _config_json(model_config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "torch_dtype")
    kept = {key: value for key, value in model_config.items() if key not in dropped}
    return {**kept, "architectures": ["GptOssForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}


def _generation_json(model_config: dict[str, Any]) -> dict[str, Any]:
    """End of text, end of a turn and a tool call all end a generation."""
    return {
        "bos_token_id": model_config["bos_token_id"],
        "eos_token_id": [200_002, 199_999, 200_012],
        "pad_token_id": model_config["pad_token_id"],
        "do_sample": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
