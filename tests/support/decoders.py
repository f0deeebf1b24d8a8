"""A small model that decodes in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.model import OfflineModel
from cpt.offline.ranks import single_process
from tests.dist.cases import decoding_model

VOCAB_SIZE = 512


@contextmanager
def small_decoder(folder: Path) -> Iterator[OfflineModel]:
    """Yield `decoding_model` as a decoder; its weights are saved in a folder on the way."""
    decoding_model(VOCAB_SIZE, num_layers=4).save_pretrained(str(folder))
    config = load_config(folder, None)
    with single_process() as topology:
        model = OfflineModel(config, topology)
        model.load(DirectoryWeights(folder, parameter_shapes(config)))
        yield model
