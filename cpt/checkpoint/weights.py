"""The weights of a checkpoint in pieces: memory holds one piece, never a file or a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.range_index import RangeIndex, read_range_index
from cpt.checkpoint.reader import read_ranges
from cpt.model.weights.hf_layout import is_expert_name

PIECE_NUMEL = 2**26
"""Elements read at once, 256 MB in fp32. A tensor with an expert axis is cut between experts."""


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
