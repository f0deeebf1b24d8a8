"""The base model's next-token distributions for the training rows of some sources, read by row.

    folder: <source>.safetensors (`ids`: (tokens, k) int32, `log_p`: (tokens, k + 1) fp32),
        kl_targets.json

A source's predicted tokens stand in the order of its rows, so that a row's part of both tensors
follows from the row number; a rank reads the bytes of its own tokens and no others.  `cpt
kl_targets` writes the folder (cpt/offline/kl_target_writer.py).

Decisions
    The sidecar names the hash of the base model's weight files, and for every source the hash of
    what its rows are made of and the hash of its file.  An edit of another source leaves the
    targets good; other rows, another base model or damaged files are refused before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpt.errors import ConfigError, DataError
from cpt.model.loss.divergence import TopK
from cpt.model.weights.byte_ranges import TensorFile
from cpt.model.weights.hf_layout import read_json
from cpt.parallel.topology import Topology
from data_pipeline.build.self_replay import weights_hash
from data_pipeline.dataset import BuiltData
from data_pipeline.store.files import xxh3_of

SIDECAR = "kl_targets.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsOfSource:
    """One source in the sidecar."""

    rows: int
    """Training rows."""
    tokens: int
    """Predicted tokens in them."""
    row_hash: str
    """`Manifest.row_hashes` of the build."""
    xxh3: str
    """Of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What kl_targets.json says."""

    base_model: str
    """Hash of the base model's weight files (`data_pipeline.build.self_replay.weights_hash`)."""
    computed_in: str
    """Dtype of the base model's forward pass."""
    build: str
    """Fingerprint of the build."""
    top_k: int
    """Listed tokens."""
    sources: Mapping[str, TargetsOfSource]
    """By name."""

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def read_sidecar(folder: Path) -> Sidecar:
    """Read kl_targets.json.

    Raises:
        ConfigError: it is missing, or no sidecar of this format.
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
            f"{path}: not a sidecar of cpt kl_targets ({error}). Write them again."
        ) from error


def target_file(folder: Path, source: str) -> Path:
    """Where the targets of a source lie."""
    return folder / f"{source}.safetensors"


def mismatches(
    sidecar: Sidecar, data: BuiltData, base_files: Sequence[Path], base_name: str
) -> list[str]:
    """Why these targets are not those of a run's data and base model.

    Args:
        sidecar: Of the targets.
        data: What the run trains on.
        base_files: Weight files it starts from; empty for random weights.
        base_name: What a message calls that model.
    """
    problems = []
    own = weights_hash(base_files) if base_files else "random weights"
    if own != sidecar.base_model:
        problems.append(
            f"train.kl_targets are of the model {sidecar.base_model[:16]}, this run starts from {base_name} "
            f"({own[:16]})."
        )
    row_hashes = data.manifest.row_hashes()
    for name, stored in sidecar.sources.items():
        if name not in row_hashes:
            problems.append(f"train.kl_targets has source '{name}', {data.directory} has not.")
        elif row_hashes[name] != stored.row_hash:
            number = data.source_names.index(name)
            problems.append(
                f"train.kl_targets: source '{name}' was built otherwise: {stored.rows} rows of {stored.tokens} tokens "
                f"({stored.row_hash[:10]}) there, {data.num_rows(number)} of {int(data.row_tokens(number).sum())} "
                f"({row_hashes[name][:10]}) in {data.directory}."
            )
    return [*problems, "Write the targets again with cpt kl_targets."] if problems else []


def presence_problems(folder: Path) -> list[str]:
    """Return the target files that the sidecar names and that are missing; nothing is hashed.

    Raises:
        ConfigError: the sidecar is missing or malformed.
    """
    problems = []
    for name in read_sidecar(folder).sources:
        file = target_file(folder, name)
        if not file.is_file():
            problems.append(
                f"train.kl_targets: {file} does not exist. Put it back, or write the targets again "
                "with cpt replay targets."
            )
    return problems


def check_targets(
    folder: Path, data: BuiltData, base_files: Sequence[Path], base_name: str
) -> None:
    """Compare targets with a run, and their files with the sidecar; reads the weights and the
    targets once.

    Raises:
        ConfigError: they are of another model or of other rows.
        DataError: a file is missing or damaged.
    """
    sidecar = read_sidecar(folder)
    if problems := mismatches(sidecar, data, base_files, base_name):
        raise ConfigError(problems)
    for name, stored in sidecar.sources.items():
        file = target_file(folder, name)
        found = xxh3_of(file) if file.is_file() else "no file"
        if found != stored.xxh3:
            raise DataError(
                f"{file}: damaged, its hash is {found[:16]}, {SIDECAR} says {stored.xxh3[:16]}. Write the targets "
                "again."
            )


class KLTargets:
    """Targets that `check_targets` found good, open for reading."""

    def __init__(
        self, folder: Path, source_names: Sequence[str], row_tokens: Mapping[str, Any]
    ) -> None:
        """Open the files.

        Args:
            folder: What `cpt kl_targets` wrote.
            source_names: The sources that row places refer to, by number.
            row_tokens: Predicted tokens of each training row, by name of the source.
        """
        sidecar = read_sidecar(folder)
        self._top_k = sidecar.top_k
        self._numbers = {
            number: name for number, name in enumerate(source_names) if name in sidecar.sources
        }
        self._files = {
            name: TensorFile(target_file(folder, name)) for name in self._numbers.values()
        }
        self._ends = {name: np.cumsum(row_tokens[name]) for name in self._numbers.values()}

    @property
    def sources(self) -> list[str]:
        """Sources that have targets."""
        return list(self._numbers.values())

    def of_rows(
        self, places: Sequence[tuple[int, int]], topology: Topology, seq_len: int
    ) -> TopK | None:
        """The targets of this rank's tokens.

        Args:
            places: Source and row number of each row of a micro batch.
            topology: Which part of a row is this rank's.
            seq_len: Slots of a row.

        Returns:
            The targets on this rank's device; None if there is none for any token.
        """
        local = seq_len // topology.sp_size
        parts = [self._read(*place, topology.sp_rank * local, local) for place in places]
        at = [slots + index * local for index, (slots, _, _) in enumerate(parts)]
        if not sum(map(len, at)):
            return None
        return TopK(
            at_n=torch.cat(at).to(topology.device),
            ids_nk=torch.cat([ids for _, ids, _ in parts]).to(topology.device, torch.int64),
            log_p_nK=torch.cat([log_p for _, _, log_p in parts]).to(topology.device),
        )

    def _read(
        self, source: int, row: int, first: int, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of slots [first, first + slots) of a row: which have a target, from `first` on; ids;
        log-probabilities.
        """
        k = self._top_k
        name = self._numbers.get(source)
        begin = end = 0
        if name is not None:
            row_begin, row_end = (
                (int(self._ends[name][row - 1]) if row else 0),
                int(self._ends[name][row]),
            )
            begin, end = row_begin + first, min(row_end, row_begin + first + slots)
        if name is None or begin >= end:
            return (
                torch.zeros(0, dtype=torch.int64),
                torch.zeros((0, k), dtype=torch.int32),
                torch.zeros((0, k + 1)),
            )
        file = self._files[name]
        ids = file.elements("ids", begin * k, end * k).view(-1, k)
        return (
            torch.arange(end - begin),
            ids,
            file.elements("log_p", begin * (k + 1), end * (k + 1)).view(-1, k + 1),
        )
