"""Reading of KL targets: the base model's next-token distributions for the rows of some sources.

A rank reads the bytes of its own tokens and no others; the format is in
cpt/training/kl_target_format.py.

Decisions
    The sidecar names the hash of the base model's weight files, and for every source the hash of
    what its rows are made of and the hash of its file. An edit of another source leaves the targets
    good. Other rows, another base model or damaged files are refused before the first step.
    A target stands where its label is: with a loss mask those of a row are fewer than its slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpt.errors import ConfigError, DataError
from cpt.model.loss.divergence import TopKTargets
from cpt.training.kl_target_format import (
    SIDECAR,
    Sidecar,
    TargetFileReader,
    hash_target_file,
    read_sidecar,
    target_file,
)
from data_pipeline.build.self_replay import weights_hash
from data_pipeline.dataset import IGNORED_LABEL, BuiltData
from data_pipeline.store.packing import Integers


def mismatches(
    sidecar: Sidecar, data: BuiltData, base_files: Sequence[Path], base_name: str
) -> list[str]:
    """Return why these targets are not those of a run's data and base model.

    Args:
        sidecar: Describes the targets.
        data: The data that the run trains on.
        base_files: Weight files that the run starts from; empty for random weights.
        base_name: Name of that model in messages.
    """
    problems = []
    own = weights_hash(base_files) if base_files else "random weights"
    if own != sidecar.base_model:
        problems.append(
            f"train.kl_targets are of the model {sidecar.base_model[:16]}, this run starts from "
            f"{base_name} ({own[:16]})."
        )
    row_hashes = data.manifest.row_hashes()
    for name, stored in sidecar.sources.items():
        if name not in row_hashes:
            problems.append(f"train.kl_targets has source '{name}', {data.directory} has not.")
        elif row_hashes[name] != stored.row_hash:
            number = data.source_names.index(name)
            problems.append(
                f"train.kl_targets: source '{name}' was built otherwise: {stored.rows} rows of "
                f"{stored.tokens} tokens ({stored.row_hash[:10]}) there, {data.num_rows(number)} "
                f"of {int(data.row_tokens(number).sum())} ({row_hashes[name][:10]}) in "
                f"{data.directory}."
            )
    if problems:
        problems.append("Write the targets again with cpt kl_targets.")
    return problems


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
                "with cpt kl_targets."
            )
    return problems


def check_targets(
    folder: Path, data: BuiltData, base_files: Sequence[Path], base_name: str
) -> None:
    """Compare targets with a run, and their files with the sidecar.

    The weights and the targets are read once for it.

    Raises:
        ConfigError: the targets are of another model or of other rows.
        DataError: a file is missing or damaged.
    """
    sidecar = read_sidecar(folder)
    problems = mismatches(sidecar, data, base_files, base_name)
    if problems:
        raise ConfigError(problems)
    for name, stored in sidecar.sources.items():
        file = target_file(folder, name)
        found = hash_target_file(folder, name) if file.is_file() else "no file"
        if found != stored.xxh3:
            raise DataError(
                f"{file}: damaged, its hash is {found[:16]}, {SIDECAR} says {stored.xxh3[:16]}. "
                "Write the targets again."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledSlots:
    """A rank's part of a training row."""

    source: int
    """Number of the source."""
    row: int
    """Number of the row within the source."""
    labels: Integers
    """Labels of the part, [T]; IGNORED_LABEL where there is none."""
    labels_before: int
    """Labels of the row before the part."""


class KLTargets:
    """Targets that `check_targets` found good, open for reading."""

    def __init__(
        self, folder: Path, source_names: Sequence[str], row_tokens: Mapping[str, Any]
    ) -> None:
        """Open the files.

        Args:
            folder: The folder that `cpt kl_targets` wrote.
            source_names: The sources that row places refer to, by number.
            row_tokens: Predicted tokens of each training row, by name of the source.
        """
        sidecar = read_sidecar(folder)
        self._top_k = sidecar.top_k
        self._names: dict[int, str] = {}
        self._files: dict[int, TargetFileReader] = {}
        self._ends: dict[int, Any] = {}
        for number, name in enumerate(source_names):
            if name in sidecar.sources:
                self._names[number] = name
                self._files[number] = TargetFileReader(folder, name, sidecar.top_k)
                self._ends[number] = np.cumsum(row_tokens[name])

    @property
    def sources(self) -> list[str]:
        """Names of the sources that have targets."""
        return list(self._names.values())

    def has_source(self, source: int) -> bool:
        """Return whether the rows of a source have targets."""
        return source in self._files

    def of_rows(self, rows: Sequence[LabeledSlots]) -> TopKTargets | None:
        """Return the targets of this rank's part of the rows of a micro batch.

        Returns:
            The targets on the CPU, for each label in its order; None if there is none for any.
        """
        at, ids, log_p = [], [], []
        num_slots_before = 0
        for slots in rows:
            places = np.flatnonzero(slots.labels != IGNORED_LABEL)
            if len(places) and self.has_source(slots.source):
                begin = self._first_token(slots.source, slots.row) + slots.labels_before
                row_ids, row_log_p = self._files[slots.source].read(begin, begin + len(places))
                at.append(torch.from_numpy(places + num_slots_before))
                ids.append(row_ids)
                log_p.append(row_log_p)
            num_slots_before += len(slots.labels)
        if not at:
            return None
        return TopKTargets(
            at_n=torch.cat(at), ids_nk=torch.cat(ids).to(torch.int64), log_p_nK=torch.cat(log_p)
        )

    def _first_token(self, source: int, row: int) -> int:
        """Return the number, in the source's file, of the first predicted token of a row."""
        return int(self._ends[source][row - 1]) if row > 0 else 0
