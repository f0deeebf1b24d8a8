"""The model that an MXFP4 export is compared with: the one that its run started from.

    --base, or the base of an adapter, or model.path of the run -> BaseChoice -> ExportBase

An export never fails for want of a base that nobody named: then the report says what it lacks, and
why. Shape letters: C inputs (columns), R output rows, b blocks of a row (C / 32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterBase
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.model_weights import adapter_of
from cpt.checkpoint.run_state import RunState
from cpt.errors import CheckpointError, ConfigError
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import expert_matrices
from cpt.model.weights.source import WeightSource, read_window
from cpt.model.weights.values import ValuesSeen, describe_values
from data_pipeline.escaping import escaped_line

CURE = "Give its directory, or that of another model to compare with, by --base."


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseChoice:
    """The model to compare an export with, or why there is none."""

    base: ExportBase | None = None
    """The model, opened; None if there is none."""
    absent: str = ""
    """Why there is none, and what to do, without a path of this machine; empty if there is one."""


def choose_base(folder: Path, manifest: Manifest, given: Path | None) -> BaseChoice:
    """Return the model to compare the export of a checkpoint with.

    All its expert matrices are read once: a value that cannot be compared must not end an export
    that has been written for hours.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        given: What the user has named (`--base`); None for what the run started from.

    Raises:
        ConfigError: the model that the user has named cannot be read, is another architecture, or
            holds values that cannot be weights.
        CheckpointError: it is a checkpoint that is damaged.
    """
    if given is not None:
        base = open_base(given, manifest)
        base.check_experts()
        return BaseChoice(base=base)
    path = _start_of_run(folder, manifest)
    if path is None:
        return BaseChoice(
            absent="The checkpoint names no model that its weights came from: they were random, or "
            f"it is of no run. {CURE}"
        )
    told = f"The model that the run started from, {escaped_line(path.name, 200)},"
    if not path.is_dir():
        return BaseChoice(absent=f"{told} is not where it was. {CURE}")
    try:
        base = open_base(path, manifest)
    except (ConfigError, CheckpointError):
        return BaseChoice(
            absent=f"{told} cannot be read any more, or has another architecture now. {CURE}"
        )
    began_with = RunState.of(manifest).starting_model
    if began_with is not None and not base.is_known_as(began_with):
        return BaseChoice(absent=f"{told} is another one now than it was then. {CURE}")
    try:
        base.check_experts()
    except ConfigError:
        return BaseChoice(absent=f"{told} holds values now that cannot be weights. {CURE}")
    return BaseChoice(base=base)


def _start_of_run(folder: Path, manifest: Manifest) -> Path | None:
    adapter = adapter_of(folder, manifest)
    if adapter is not None:
        return None if adapter.base.path is None else Path(adapter.base.path)
    model = (RunState.of(manifest).config or {}).get("model")
    path = model.get("path") if isinstance(model, dict) else None
    return Path(path) if isinstance(path, str) else None


def open_base(path: Path, manifest: Manifest) -> ExportBase:
    """Open a model to compare the export of a checkpoint with.

    Raises:
        ConfigError: it cannot be read, or has other tensors than the checkpoint's model.
        CheckpointError: it is a checkpoint that is damaged.
    """
    return ExportBase(path, model_config_of(manifest))


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseExpert:
    """One expert of the base."""

    values_1CR: torch.Tensor
    """Its values in bf16."""
    codes: tuple[torch.Tensor, torch.Tensor] | None
    """Blocks (1, R, b, 16) and scales (1, R, b) as stored; None if it is no MXFP4."""


class ExportBase:
    """The weights that training began with, read expert by expert."""

    def __init__(self, path: Path, config: GptOssConfig) -> None:
        """Open the files; only their headers and samples for a hash are read.

        Args:
            path: A Hugging Face directory or a checkpoint.
            config: The model of the export, whose tensors the base must have.

        Raises:
            ConfigError: it cannot be read, or has other tensors.
            CheckpointError: it is a checkpoint that is damaged.
        """
        self.path = path
        """Where it lies."""
        self._known = AdapterBase.of(path, 0, config, option="--base")
        self.name = self._known.name
        """Its name for people, without the place where it lies."""
        self.hash = self._known.told
        """A hash of it, wherever it lies."""
        self.shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(config)
        """Shape of every tensor."""
        self.source = self._known.open(config)
        """Its weights."""

    def is_known_as(self, recorded: object) -> bool:
        """Return whether a run has recorded this model (`RunState.starting_model`)."""
        if not isinstance(recorded, Mapping):
            return False
        return self._known.is_known_as(recorded.get("hash"), recorded.get("sums"))

    def is_mxfp4(self, name: str) -> bool:
        """Return whether an expert matrix is stored as MXFP4 codes."""
        return isinstance(self.source, DirectoryWeights) and self.source.holds_codes(name)

    def expert(self, name: str, index: int) -> BaseExpert:
        """Read one expert of a matrix.

        Raises:
            StorageError: the file could not be read.
        """
        if isinstance(self.source, DirectoryWeights) and self.source.holds_codes(name):
            blocks_Rb16, scales_Rb = self.source.codes(name, index)
            codes = (blocks_Rb16[None], scales_Rb[None])
            return BaseExpert(values_1CR=mxfp4.decode(*codes), codes=codes)
        _, inputs, rows = self.shapes[name]
        numel = inputs * rows
        flat = read_window(self.source, name, index * numel, (index + 1) * numel)
        values_1CR = flat.to(torch.bfloat16).view(1, inputs, rows)
        return BaseExpert(values_1CR=values_1CR, codes=None)

    def check_experts(self) -> None:
        """Read every expert matrix once, MXFP4 codes without decoding them.

        Raises:
            ConfigError: values are not finite, or a matrix holds only zeros.
        """
        for name in expert_matrices(self.shapes):
            if isinstance(self.source, DirectoryWeights):
                _read_matrix(self.source, name, self.shapes[name])
            else:
                _check_matrix(self.source, name, self.shapes[name], self.path)
        self.refuse_unusable()

    def refuse_unusable(self) -> None:
        """Refuse a base whose values, as far as they were read, cannot be weights.

        Raises:
            ConfigError: values are not finite, or tensors hold only zeros.
        """
        if isinstance(self.source, DirectoryWeights):
            self.source.refuse_unusable([self.source.seen_json()])


def _read_matrix(source: DirectoryWeights, name: str, shape: tuple[int, ...]) -> None:
    """Read a matrix of a directory, which notes by itself what it sees."""
    if source.holds_codes(name):
        for expert in range(shape[0]):
            source.codes(name, expert)
        return
    for _ in source.pieces(name, 0, math.prod(shape)):
        pass


def _check_matrix(source: WeightSource, name: str, shape: tuple[int, ...], path: Path) -> None:
    """Read a matrix of a checkpoint, and refuse values that cannot be weights.

    Raises:
        ConfigError: see `ExportBase.check_experts`.
    """
    seen = ValuesSeen()
    for position, values in source.pieces(name, 0, math.prod(shape)):
        seen.look(position, values)
    told = describe_values(name, seen, shape)
    if told:
        raise ConfigError(f"{path}: {told}")
