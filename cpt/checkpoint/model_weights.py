"""The model of a checkpoint as a source of weights, also if the checkpoint holds an adapter alone.

Then its weights are those of its base with the adapter added, and the base is read from where it
lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cpt.checkpoint.adapter_state import AdapterState, base_from
from cpt.checkpoint.manifest import Manifest, fp32_records
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.reader import check_same_tensors
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.weights import PIECE_NUMEL, CheckpointWeights
from cpt.config.sections import DTYPES
from cpt.model.adapters.layout import adapted_matrices, adapter_shapes
from cpt.model.adapters.merged import AdaptedWeights
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.hf_layout import is_expert_name
from cpt.model.weights.source import WeightSource, read_window


def adapter_of(folder: Path, manifest: Manifest) -> AdapterState | None:
    """Return the adapter that a checkpoint holds; None if it holds a whole model.

    Raises:
        CheckpointError: its tensors are not those that it tells of.
    """
    state = AdapterState.of(RunState.of(manifest), folder.name)
    if state is None:
        return None
    config = model_config_of(manifest)
    state.check(config, folder.name)
    wanted = fp32_records(adapter_shapes(state.section, config))
    check_same_tensors(folder.name, manifest.tensors, wanted)
    return state


def merged_weights(
    folder: Path,
    manifest: Manifest,
    adapter: AdapterState,
    dtype: torch.dtype,
    base: Path | None = None,
) -> AdaptedWeights:
    """Return the weights of an adapter's base with the adapter added.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        adapter: What it holds (`adapter_of`).
        dtype: The dtype of the values.
        base: Directory of the base; None for where it was in training.

    Raises:
        ConfigError: the base is not there, or is another model.
    """
    config = model_config_of(manifest)
    opened = base_from(adapter, base, config, folder.name).open(config)
    return AdaptedWeights(
        opened,
        CheckpointWeights(folder, manifest, torch.float32),
        adapted_matrices(adapter.section, config),
        adapter.section.scale,
        shapes=parameter_shapes(config),
        trained_beside=DTYPES[adapter.dtype],
        dtype=dtype,
    )


def open_weights(
    folder: Path, manifest: Manifest, dtype: torch.dtype, base: Path | None = None
) -> CheckpointWeights | AdaptedWeights:
    """Return the weights of a checkpoint's model as a source, rounded to a dtype.

    The arguments and errors are those of `merged_weights`.

    Raises:
        CheckpointError: it is an adapter whose tensors are not those that it tells of.
    """
    adapter = adapter_of(folder, manifest)
    if adapter is None:
        return CheckpointWeights(folder, manifest, dtype)
    return merged_weights(folder, manifest, adapter, dtype, base)


def whole_expert_pieces(
    source: WeightSource, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield all values of a source as (name, first element, 1-D values), names in order.

    Tensors with an expert axis are cut between experts.
    """
    for name, shape in sorted(shapes.items()):
        numel = math.prod(shape)
        unit = numel // shape[0] if is_expert_name(name) else 1
        step = max(1, PIECE_NUMEL // unit) * unit
        for start in range(0, numel, step):
            yield name, start, read_window(source, name, start, min(numel, start + step))
