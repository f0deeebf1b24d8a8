"""A small model that decodes in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.model import OfflineModel
from cpt.offline.ranks import single_process
from tests.dist.cases import model_config, reference_model


@contextmanager
def small_decoder(folder: Path) -> Iterator[OfflineModel]:
    """Yield `reference_model` as a decoder; its weights are saved in a folder on the way."""
    reference_model().save_pretrained(str(folder))
    config = model_config()
    with single_process() as topology:
        model = OfflineModel(config, topology)
        model.load(DirectoryWeights(folder, parameter_shapes(config)))
        yield model
