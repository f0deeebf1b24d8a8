"""Names of a Hugging Face gpt-oss directory: its files, and which of its tensors hold experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpt.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
EXPERT_TENSORS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The expert parameters of a layer, under `mlp.experts.`; their first axis counts experts."""

BLOCKS = "_blocks"
SCALES = "_scales"
"""Suffixes of the two tensors that stand for an expert matrix in the released MXFP4 layout."""


def is_expert_name(name: str) -> bool:
    """Return whether a parameter of this name has an expert axis."""
    return ".experts." in name and name.rsplit(".", 1)[1] in EXPERT_TENSORS


def is_expert_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor holds one matrix per expert, which MXFP4 may stand for."""
    return is_expert_name(name) and len(shape) == 3


def tensor_files(path: Path) -> dict[str, Path]:
    """Return the safetensors file of every tensor of a Hugging Face directory, by tensor name.

    Raises:
        ConfigError: The directory has no safetensors, or its index is damaged or names missing
            files.
    """
    index = path / INDEX_FILE
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ConfigError(f"{index}: has no weight_map from tensor names to files.")
        files = {name: path / Path(file).name for name, file in names.items()}
    elif (path / SINGLE_FILE).is_file():
        with open_tensors(path / SINGLE_FILE) as opened:
            files = dict.fromkeys(opened.keys(), path / SINGLE_FILE)
    else:
        raise ConfigError(
            f"{path}: neither {INDEX_FILE} nor {SINGLE_FILE} is there.{_pickles_in(path)} "
            "Save as safetensors."
        )
    missing = sorted({str(file) for file in files.values() if not file.is_file()})
    if missing:
        raise ConfigError([f"{index} names {file}, which does not exist." for file in missing])
    return files


def _pickles_in(path: Path) -> str:
    """Return a sentence on the pickles of a directory, which are not read; empty without any."""
    names = [file.name for file in path.glob("*") if file.suffix in PICKLE_SUFFIXES]
    if not names:
        return ""
    return f" It holds {', '.join(sorted(names))}: pickles can run code and are not read."


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must be a JSON object.")
    return values


def open_tensors(file: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ConfigError: It is not a whole safetensors file.
    """
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a whole safetensors file ({error}).") from error
