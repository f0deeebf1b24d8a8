"""The weights that a checkpoint would be served with, in bf16.

Where `train.quantize` rounded the experts, those are the rounded ones, which the last forward pass
used; the checkpoint itself holds the master weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.model_weights import open_weights
from cpt.checkpoint.run_state import quantized_by
from cpt.model.weights.rounded_weights import RoundedWeights
from cpt.model.weights.source import WeightSource


def served_weights(folder: Path, manifest: Manifest, base: Path | None = None) -> WeightSource:
    """Return the weights of a checkpoint's model in bf16, rounded as training rounded them.

    Arguments and errors are those of `open_weights`.
    """
    weights = open_weights(folder, manifest, torch.bfloat16, base)
    rule = quantized_by(manifest)
    if rule is None:
        return weights
    return RoundedWeights(weights, weights.shapes, rule)
