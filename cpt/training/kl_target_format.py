"""The format of KL targets on disk: the base model's next-token distributions for training rows.

    folder: <source>.safetensors   ids: (tokens, k) int32; log_p: (tokens, k + 1) fp32
            kl_targets.json        what the targets were computed from, and the hash of every file

The predicted tokens of a source, those that bear loss, stand in the order of its rows and of their
slots, so a row's part of both tensors follows from the row number. The last column of `log_p` is
the log-probability of all tokens that are not listed.

`cpt kl_targets` writes the folder (cpt/offline/kl_target_writer.py), and training reads it
(cpt/training/kl_targets.py). Both know the format from here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cpt.errors import ConfigError
from cpt.model.weights.byte_ranges import TensorFile
from cpt.model.weights.hf_layout import read_json
from cpt.model.weights.writer import Entry, TensorFileWriter
from data_pipeline.store.files import AtChunk, no_call, write_json, xxh3_of

SIDECAR = "kl_targets.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsOfSource:
    """The targets of one source, as the sidecar describes them."""

    rows: int
    """Number of training rows."""
    tokens: int
    """Number of predicted tokens in them."""
    row_hash: str
    """Hash of what the rows are made of (`BuildManifest.row_hashes` of the build)."""
    xxh3: str
    """Hash of the source's file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """The content of kl_targets.json."""

    base_model: str
    """Hash of the base model's weight files (`data_pipeline.build.self_replay.weights_hash`)."""
    computed_in: str
    """Dtype of the base model's forward pass."""
    build: str
    """Fingerprint of the build."""
    top_k: int
    """Number of listed tokens, k."""
    sources: Mapping[str, TargetsOfSource]
    """Targets by name of the source."""

    def content(self) -> dict[str, Any]:
        """Return the content of the file as plain values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def read_sidecar(folder: Path) -> Sidecar:
    """Read kl_targets.json.

    Raises:
        ConfigError: the file is missing or is no sidecar of this format.
    """
    path = folder / SIDECAR
    if not path.is_file():
        raise ConfigError(
            f"train.kl_targets: {path} does not exist. Write the targets with cpt kl_targets."
        )
    content = read_json(path)
    if content.pop("format_version", None) != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: not of format version {FORMAT_VERSION}. Write the targets again."
        )
    try:
        sources = {
            name: TargetsOfSource(**source) for name, source in content.pop("sources").items()
        }
        return Sidecar(**content, sources=sources)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a sidecar of cpt kl_targets ({error}). Write the targets again."
        ) from error


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write kl_targets.json, which completes a folder of targets."""
    write_json(folder / SIDECAR, sidecar.content(), indent=2, sort_keys=True)


def target_file(folder: Path, source: str) -> Path:
    """Return the path of a source's targets."""
    return folder / f"{source}.safetensors"


def hash_target_file(folder: Path, source: str, at_chunk: AtChunk = no_call) -> str:
    """Return the hash that the sidecar keeps of a source's file; see `AtChunk`."""
    return xxh3_of(target_file(folder, source), at_chunk)


def bytes_per_token(top_k: int) -> int:
    """Return the bytes that the targets of one predicted token take.

    These are an int32 for each listed token, an fp32 for each of them, and an fp32 for all others
    together.
    """
    return 4 * top_k + 4 * (top_k + 1)


class TargetFileWriter:
    """A source's file that is filled row by row."""

    def __init__(self, folder: Path, source: str, tokens: int, top_k: int) -> None:
        """Create the file.

        Args:
            folder: The folder of the targets.
            source: Name of the source.
            tokens: Predicted tokens of all its rows.
            top_k: Number of listed tokens.
        """
        self._top_k = top_k
        self._num_written = 0
        shapes = {
            "ids": Entry(shape=(tokens, top_k), dtype=torch.int32),
            "log_p": Entry(shape=(tokens, top_k + 1), dtype=torch.float32),
        }
        self._file = TensorFileWriter(target_file(folder, source), shapes)

    def append(self, ids: torch.Tensor, log_p: torch.Tensor) -> None:
        """Write the next row's (tokens, k) ids and (tokens, k + 1) log-probabilities."""
        self._file.write("ids", self._num_written * self._top_k, ids.to(torch.int32))
        self._file.write("log_p", self._num_written * (self._top_k + 1), log_p.float())
        self._num_written += len(ids)

    def finish(self) -> None:
        """Complete the file."""
        self._file.finish()

    def close(self) -> None:
        """Release the file, complete or not."""
        self._file.close()


class TargetFileReader:
    """A source's file, of which ranges of tokens are read."""

    def __init__(self, folder: Path, source: str, top_k: int) -> None:
        self._top_k = top_k
        self._file = TensorFile(target_file(folder, source))

    def read(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, k) ids and (n, k + 1) log-probabilities of the tokens [begin, end)."""
        k = self._top_k
        ids = self._file.elements("ids", begin * k, end * k)
        log_p = self._file.elements("log_p", begin * (k + 1), end * (k + 1))
        return ids.view(-1, k), log_p.view(-1, k + 1)
