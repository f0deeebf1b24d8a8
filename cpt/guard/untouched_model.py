"""The untouched model, which every yardstick compares with: where it lies, its name, its hash.

It is the model that a run starts from, unless `guard.baseline_model` names another one: a run that
fine-tunes a pretrained checkpoint is then judged against the original release.
"""

from __future__ import annotations

from pathlib import Path

from cpt.checkpoint.starting_model import weight_files
from cpt.config import RunConfig
from cpt.model.weights.checksums import weights_identity
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology


def untouched_path(config: RunConfig) -> Path | None:
    """Return where the untouched model lies; None if it has random weights."""
    return config.guard.baseline_model or config.model.path


def untouched_name(config: RunConfig) -> str:
    """Return the name of the untouched model in files and messages."""
    path = untouched_path(config)
    return str(path or f"{config.model.init}, seed {config.train.seed}")


def untouched_weights(config: RunConfig, topology: Topology) -> str:
    """Return the `weights_identity` of the untouched weights, wherever they lie.

    Of random weights it is the name of the preset with the seed. All ranks call it together.
    """
    path = untouched_path(config)
    if path is None:
        return untouched_name(config)
    return on_first_rank(topology.control_group, lambda: weights_identity(weight_files(path)))
