"""Flat ranges for torch.distributed.checkpoint: each rank writes contiguous ranges of 1-D tensors.

A ZeRO shard of any stage is such a range, and so is a slice of the expert axis; a DTensor could
only express the even cuts of ZeRO-3. The files know nothing of the layout that wrote them, so any
layout can read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRange:
    """Elements [offset, offset + len(tensor)) of a flattened global tensor."""

    tensor: torch.Tensor
    """1-D values, read on save and written in place on load."""
    offset: int
    """First element in the global tensor."""
    global_numel: int
    """Number of elements of the global tensor."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """This range as a chunk of torch.distributed.checkpoint."""
        return ChunkStorageMetadata(
            offsets=torch.Size([self.offset]), sizes=torch.Size([self.tensor.numel()])
        )


class FlatSavePlanner(DefaultSavePlanner):
    """A planner that saves a dictionary of FlatRange in fp32."""

    state_dict: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, part in self.state_dict.items():
            data = TensorWriteData(
                chunk=part.chunk,
                properties=TensorProperties(dtype=torch.float32),
                size=torch.Size([part.global_numel]),
            )
            index = MetadataIndex(key, part.chunk.offsets)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor.float()
