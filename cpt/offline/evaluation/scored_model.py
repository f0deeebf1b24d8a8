"""What `cpt evaluate` scores: an exported directory, or the checkpoint of a run.

A checkpoint is scored as its export in bf16 would be, or in MXFP4 where training rounded the
experts; of an adapter that is its base with the adapter added, without a merged copy on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import GptOssConfig

from cpt.checkpoint.manifest import MANIFEST, read_manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.served_weights import served_weights
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import model_hash, weights_identity
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import tensor_files
from cpt.model.weights.source import WeightSource
from cpt.model.weights.tokenizer_check import tokenizer_problems
from cpt.offline.plain_model import DeviceMap, load_checkpoint, load_export


class ScoredModel(Protocol):
    """A model that tasks can be run on."""

    @property
    def path(self) -> Path:
        """Where it lies, which is its name in results."""

    def config(self) -> GptOssConfig:
        """Return its configuration."""

    def weights(self) -> WeightSource:
        """Return its weights."""

    def identity(self) -> str:
        """Return what tells it from other models, wherever it lies."""

    def plain(self, device_map: DeviceMap) -> Any:
        """Return it as a model of plain transformers."""

    def tokenizer_problems(self) -> list[str]:
        """Return why its tokenizer is not o200k_harmony."""


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A Hugging Face directory."""

    path: Path
    """The directory."""

    def config(self) -> GptOssConfig:
        """Return its configuration."""
        return load_config(self.path, None, option="--model")

    def weights(self) -> WeightSource:
        """Return its weights."""
        return DirectoryWeights(self.path, parameter_shapes(self.config()))

    def identity(self) -> str:
        """Return `model_hash` of the directory."""
        return model_hash(self.path, set(tensor_files(self.path).values()))

    def plain(self, device_map: DeviceMap) -> Any:
        """Return it as a model of plain transformers."""
        return load_export(self.path, device_map)

    def tokenizer_problems(self) -> list[str]:
        """Return why its tokenizer is not o200k_harmony."""
        return tokenizer_problems(self.path, self.config().vocab_size)


@dataclass(frozen=True, slots=True)
class ModelOfCheckpoint:
    """The model of a verified checkpoint."""

    path: Path
    """The checkpoint."""
    base: Path | None
    """The model below an adapter; None for where it was in training."""

    def config(self) -> GptOssConfig:
        """Return its configuration."""
        return model_config_of(read_manifest(self.path))

    def weights(self) -> WeightSource:
        """Return its weights in bf16, as they would be served.

        Raises:
            ConfigError: the base of an adapter is not there, or is another model.
        """
        return served_weights(self.path, read_manifest(self.path), self.base)

    def identity(self) -> str:
        """Return what its manifest is known by, which has the hashes of its files and its base."""
        return weights_identity([self.path / MANIFEST])

    def plain(self, device_map: DeviceMap) -> Any:
        """Return it as a model of plain transformers."""
        return load_checkpoint(self.path, device_map, self.base)

    def tokenizer_problems(self) -> list[str]:
        """Return nothing: runs train with o200k_harmony."""
        return []
