"""Names of a Hugging Face gpt-oss directory: its files, and which of its tensors hold experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpt.errors import ConfigError
from data_pipeline.bounded.files import MalformedInput, read_small_file
from data_pipeline.bounded.json_text import parse_json
from data_pipeline.config.links import dangling_link
from data_pipeline.escaping import escaped_line
from data_pipeline.store.file_kinds import FileKind, describe_head, kind_of_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
MAX_JSON_BYTES = 2**22
"""Bytes of a config.json or an index; those of the released 120b have some 50 kB."""
MAX_JSON_CONTAINERS = 2**21
"""Lists and objects of a JSON file; the released tokenizer.json has fewer than 10^6.

Each takes some 70 bytes of memory for two in the file.
"""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
EXPERT_TENSORS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The expert parameters of a layer, under `mlp.experts.`; their first axis counts experts."""
EXPERT_ADAPTERS = (
    "gate_up_proj_lora_A",
    "gate_up_proj_lora_B",
    "down_proj_lora_A",
    "down_proj_lora_B",
)
"""The adapters of the experts of a layer, beside them; their first axis counts experts, too."""

BLOCKS = "_blocks"
SCALES = "_scales"
"""Suffixes of the two tensors that stand for an expert matrix in the released MXFP4 layout."""


def holds_blocks(path: Path) -> bool:
    """Return whether a directory has experts in the MXFP4 layout; False if it cannot be read."""
    try:
        names = tensor_files(path)
    except ConfigError:
        return False
    return any(name.endswith(BLOCKS) for name in names)


def is_expert_name(name: str) -> bool:
    """Return whether a parameter of this name has an expert axis."""
    last = name.rpartition(".")[2]
    return ".experts." in name and last in (*EXPERT_TENSORS, *EXPERT_ADAPTERS)


def is_expert_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor holds one matrix per expert, which MXFP4 may stand for."""
    return is_expert_name(name) and len(shape) == 3 and not name.endswith(EXPERT_ADAPTERS)


def expert_matrices(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of all tensors that hold one matrix per expert, in order."""
    return sorted(name for name, shape in shapes.items() if is_expert_matrix(name, shape))


def tensor_files(path: Path) -> dict[str, Path]:
    """Return the safetensors file of every tensor of a Hugging Face directory, by tensor name.

    Raises:
        ConfigError: The directory has no safetensors or two sets of them, or its index is damaged
            or names missing files.
    """
    index = path / INDEX_FILE
    for file in (index, path / SINGLE_FILE):
        link = dangling_link(file)
        if link:
            raise ConfigError(link)
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ConfigError(
                f"{index}: has no weight_map from tensor names to files. Fetch it again."
            )
        files = {name: path / Path(file).name for name, file in names.items()}
    elif (path / SINGLE_FILE).is_file():
        with open_tensors(path / SINGLE_FILE) as opened:
            files = dict.fromkeys(opened.keys(), path / SINGLE_FILE)
    else:
        raise ConfigError(_why_no_weights(path))
    missing = sorted({file for file in files.values() if not file.is_file()})
    if missing:
        raise ConfigError([_why_missing(file, index) for file in missing])
    if not files:
        raise ConfigError(f"{index if index.is_file() else path / SINGLE_FILE}: {_NO_TENSOR}")
    _check_one_set(path, set(files.values()))
    return files


_NO_TENSOR = "names no tensor, so the directory holds no model. Fetch it again."


def _check_one_set(path: Path, used: set[Path]) -> None:
    """Refuse weights beside those that would be read: readers differ in which they take.

    transformers adds an adapter to them, if peft is installed.
    """
    if (path / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{path}: holds an adapter ({ADAPTER_CONFIG}) beside the weights, which other programs "
            "add to them and this project does not. Merge it into the model, or move its files "
            "away."
        )
    others = []
    for file in sorted(path.glob("*.safetensors")):
        if file not in used and (file.name == SINGLE_FILE or _SHARD.search(file.name)):
            others.append(file.name)
    if others:
        mine = escaped_line(min(used).name)
        other = escaped_line(others[0])
        counted = f"{len(others)} file{'s' if len(others) > 1 else ''}"
        raise ConfigError(
            f"{path}: holds two sets of weights, that of {mine} and that of {other} "
            f"({counted}). This project reads the first, other programs may read the second. Move "
            "one of them away."
        )


def _why_missing(file: Path, index: Path) -> str:
    link = dangling_link(file)
    return link or f"{index} names {escaped_line(file)}, which does not exist. Fetch it too."


def _why_no_weights(path: Path) -> str:
    """Return why a directory has no weights, as far as the files that it holds tell."""
    found = sorted(escaped_line(file.name) for file in path.glob("*.safetensors"))
    shards = [name for name in found if _SHARD.search(name)]
    if shards:
        return (
            f"{path}: holds {len(shards)} shards ({shards[0]}, ...) without {INDEX_FILE}, which "
            "says which tensor is in which. Fetch it from where the shards are from."
        )
    neither = f"{path}: neither {INDEX_FILE} nor {SINGLE_FILE} is there."
    if ADAPTER_FILE in found:
        return (
            f"{neither} {ADAPTER_FILE} holds an adapter (LoRA), not a model. Merge it into its "
            "base model, and give the merged directory."
        )
    if found:
        return f"{neither} It holds {', '.join(found)}: rename the one with the whole model."
    if (path / "snapshots").is_dir():
        return (
            f"{neither} It is the root of a model in the Hub's cache: give the directory below "
            f"{path / 'snapshots'} that holds config.json."
        )
    return f"{neither}{_pickles_in(path)} Save as safetensors."


def _pickles_in(path: Path) -> str:
    """Return a sentence on the pickles of a directory, which are not read; empty without any."""
    names = [escaped_line(file.name) for file in path.glob("*") if file.suffix in PICKLE_SUFFIXES]
    if not names:
        return ""
    return f" It holds {', '.join(sorted(names))}: pickles can run code and are not read."


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return a JSON object; UTF-16, UTF-32 and a byte order mark are read, too.

    Args:
        file: A regular file; nothing else is read.
        max_bytes: Bytes of the largest file that is read.

    Raises:
        ConfigError: The file cannot be read, is larger, nested deeply or with endless numbers, or
            holds something else.
    """
    try:
        content = read_small_file(file, max_bytes)
        text = content.decode(json.detect_encoding(content))
        if text.count("[") + text.count("{") > MAX_JSON_CONTAINERS:
            raise MalformedInput(f"more than {MAX_JSON_CONTAINERS:,} lists and objects")
        values = parse_json(text)
    except OSError as error:
        reason = dangling_link(file) or f"{file}: cannot be read ({error.strerror or error})."
        raise ConfigError(reason) from error
    except ValueError as error:
        kind = kind_of_file(file)
        if kind is not FileKind.TEXT:
            raise ConfigError(f"{file}: is {kind.words}, not JSON. {kind.cure}") from error
        raise ConfigError(
            f"{file}: not readable as JSON ({error}). Correct it or fetch it again."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds {type(values).__name__}, must be a JSON object.")
    return values


def open_tensors(file: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ConfigError: It is not a whole safetensors file.
    """
    try:
        kind = kind_of_file(file)
        if kind is not FileKind.SAFETENSORS:
            cure = kind.cure or "Fetch it again."
            raise ConfigError(
                f"{file}: not a whole safetensors file: it is {describe_head(file)}. {cure}"
            )
        return safe_open(str(file), framework="pt")
    except OSError as error:
        reason = dangling_link(file) or f"{file}: cannot be read ({error.strerror or error})."
        raise ConfigError(reason) from error
    except SafetensorError as error:
        raise ConfigError(
            f"{file}: not a whole safetensors file ({escaped_line(error)}). Fetch it again."
        ) from error
