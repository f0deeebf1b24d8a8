"""The weights of a checkpoint in pieces: memory holds one piece, never a file or a whole tensor.

Those of an adapter's checkpoint are the weights of its base with the adapter added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from cpt.checkpoint.adapter_state import AdapterState, base_from
from cpt.checkpoint.flat_planner import FlatRange
from cpt.checkpoint.manifest import Manifest, TensorRecord
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.range_index import RangeIndex, read_range_index
from cpt.checkpoint.reader import check_same_tensors, read_ranges
from cpt.checkpoint.run_state import RunState
from cpt.model.adapters.layout import adapted_matrices, adapter_shapes
from cpt.model.adapters.merged import MergedWeights
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.hf_layout import is_expert_name
from cpt.model.weights.source import WeightSource

PIECE_NUMEL = 2**26
"""Elements read at once, 256 MB in fp32. A tensor with an expert axis is cut between experts."""


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes of `train.dtype`."""


def adapter_of(folder: Path, manifest: Manifest) -> AdapterState | None:
    """Return the adapter that a checkpoint holds; None if it holds a whole model.

    Raises:
        CheckpointError: its tensors are not those that it tells of.
    """
    state = AdapterState.of(RunState.of(manifest), folder.name)
    if state is None:
        return None
    wanted = {}
    for name, shape in adapter_shapes(state.section, model_config_of(manifest)).items():
        wanted[name] = TensorRecord(shape=shape, dtype="float32")
    check_same_tensors(folder.name, manifest.tensors, wanted)
    return state


def merged_weights(
    folder: Path,
    manifest: Manifest,
    adapter: AdapterState,
    dtype: torch.dtype,
    base: Path | None = None,
) -> MergedWeights:
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
    return MergedWeights(
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
) -> CheckpointWeights | MergedWeights:
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
    source: WeightSource, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield all values of a source as (name, first element, 1-D values), names in order.

    Tensors with an expert axis are cut between experts.
    """
    for name, shape in sorted(shapes.items()):
        numel = math.prod(shape)
        unit = numel // shape[0] if is_expert_name(name) else 1
        step = max(1, PIECE_NUMEL // unit) * unit
        for start in range(0, numel, step):
            pieces = source.pieces(name, start, min(numel, start + step))
            yield name, start, torch.cat([values for _, values in pieces])


def stored_pieces(folder: Path, manifest: Manifest) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield all fp32 weights of a checkpoint as (name, first element, 1-D values), names in order.

    Small tensors are read together; large ones are read in parts of whole experts.
    """
    index = read_range_index(folder, manifest)
    together: dict[str, FlatRange] = {}
    waiting = 0
    for name, record in sorted(manifest.tensors.items()):
        numel = math.prod(record.shape)
        unit = numel // record.shape[0] if is_expert_name(name) else 1
        step = max(1, PIECE_NUMEL // unit) * unit
        for start in range(0, numel, step):
            size = min(step, numel - start)
            if together and (waiting + size > PIECE_NUMEL or start > 0):
                yield from _read(folder, index, together)
                together = {}
                waiting = 0
            part = FlatRange(tensor=torch.empty(size), offset=start, global_numel=numel)
            together[f"master/{name}"] = part
            waiting += size
    yield from _read(folder, index, together)


def _read(
    folder: Path, index: RangeIndex, ranges: dict[str, FlatRange]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    read_ranges(folder, index, ranges)
    for key, part in ranges.items():
        yield key.removeprefix("master/"), part.offset, part.tensor


class CheckpointWeights:
    """The weights of a checkpoint, rounded to a dtype, as a source for
    `cpt.model.weights.source.fill`.
    """

    def __init__(self, folder: Path, manifest: Manifest, dtype: torch.dtype) -> None:
        self._folder = folder
        self._index = read_range_index(folder, manifest)
        self._tensors = manifest.tensors
        self._dtype = dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: record.shape for name, record in self._tensors.items()}

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a tensor's elements [start, stop) as (first element, values)."""
        numel = math.prod(self._tensors[name].shape)
        for low in range(start, stop, PIECE_NUMEL):
            piece = torch.empty(min(PIECE_NUMEL, stop - low))
            part = FlatRange(tensor=piece, offset=low, global_numel=numel)
            read_ranges(self._folder, self._index, {f"master/{name}": part})
            yield low, piece.to(self._dtype)
