"""Text that the base model wrote itself, and the sidecar file that proves which model that was.

    folder: plain.jsonl, chat.jsonl, self_replay.json

Decisions
    The sidecar names the hash of the base model's weight files, how the text was sampled, and the
    hash of every file, so that text of another model, or edited text, cannot pass for self-replay.
    `cpt replay` writes it; a source of `kind: self_replay` is built only if it fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.store.files import write_json, xxh3_of

SIDECAR = "self_replay.json"
FORMAT_VERSION = 1


def weights_hash(files: Sequence[Path]) -> str:
    """Return the xxh3_128 over names and contents of weight files.

    This reads all of them, at about 10 GiB/s if they are in memory.
    """
    return joined_hash([(file.name, xxh3_of(file)) for file in files])


def joined_hash(hashes: Iterable[tuple[str, str]]) -> str:
    """Return the hash of weight files from (name, xxh3_128) of each; see `weights_hash`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(hashes)).encode())


def write_sidecar(
    folder: Path, base_model: str, settings: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Write the sidecar of the files `names` in `folder`, atomically.

    Args:
        folder: Folder of the files, and of the sidecar.
        base_model: Hash of the model that wrote them, from `weights_hash`.
        settings: How they were sampled.
        names: File names.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "settings": dict(settings),
        "files": {name: xxh3_of(folder / name) for name in names},
    }
    write_json(folder / SIDECAR, content, indent=1)


def base_model_of(source: SourceConfig) -> str:
    """Return the hash of the model that wrote a source; empty if it is no self-replay.

    Raises:
        DataError: a file has no sidecar, is not listed in it, or is not what the model wrote, or
            two models wrote the source.
    """
    if source.kind != "self_replay":
        return ""
    models = {_model_that_wrote(path, source.name) for path in source.files()}
    if len(models) > 1:
        raise DataError(
            f"source '{source.name}': written by {len(models)} different models. Make one source "
            "of each."
        )
    return models.pop()


def _model_that_wrote(path: Path, source_name: str) -> str:
    """Return the hash of the model that the sidecar beside a file names."""
    where = f"source '{source_name}' (kind: self_replay): {path}"
    sidecar = path.with_name(SIDECAR)
    try:
        content = read_json(sidecar, LARGE_BYTES)
        hashes = content["files"]
        base_model = str(content["base_model"])
    except OSError as error:
        raise DataError(
            f"{where}: no {SIDECAR} beside it ({error.strerror}). Write both with cpt replay."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{sidecar}: not a sidecar of cpt replay ({error}). Write it again."
        ) from error
    if hashes.get(path.name) != xxh3_of(path):
        raise DataError(
            f"{where}: not the text that {SIDECAR} lists. Put it back, or sample again."
        )
    return base_model


def check_base_model(replayed: Mapping[str, str], files: Sequence[Path], place: str) -> list[str]:
    """Return a problem for each source that another model wrote than the untouched one of a run.

    Args:
        replayed: Hash of the model that wrote each source; empty for text that no model wrote.
        files: Weight files of the run's untouched model; empty for random weights.
        place: Name of that model in messages.
    """
    if not any(replayed.values()):
        return []
    own = weights_hash(files) if files else "random weights"
    problems = []
    for name, base_model in replayed.items():
        if base_model and base_model != own:
            problems.append(
                f"source '{name}' was written by the model {base_model[:16]}, but the untouched "
                f"model of this run is {place} ({own[:16]}). Replay of another model is not in the "
                "distribution of this one: if this run goes on from a model that was trained from "
                "the writer, name the writer with guard.baseline_model; else sample again with "
                "cpt replay, or remove `kind: self_replay` to train on it as plain text."
            )
    return problems
