"""Flat ranges for torch.distributed.checkpoint: each rank writes and reads contiguous ranges of 1-D
tensors.

A ZeRO shard of any stage is such a range, and so is a slice of the expert axis; a DTensor could
only express the even cuts of ZeRO-3. The files know nothing of the layout that wrote them, so any
layout can read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from cpt.errors import CheckpointError


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


class FlatLoadPlanner(DefaultLoadPlanner):
    """A planner that fills a dictionary of FlatRange; the checkpoint must cover every range."""

    state_dict: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # The base class looks for meta tensors among the values and replaces those of a class that
        # it does not know by None.
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for key, part in self.state_dict.items():
            record = stored[key]
            if not isinstance(record, TensorStorageMetadata):
                raise CheckpointError(
                    f"'{key}' is stored as bytes, not as a tensor; such entries are not read."
                )
            reads = create_read_items_for_chunk_list(key, record, [part.chunk])
            found = sum(item.lengths[0] for item in reads)
            if tuple(record.size) != (part.global_numel,) or found != part.tensor.numel():
                end = part.offset + part.tensor.numel()
                raise CheckpointError(
                    f"tensor '{key}': elements {part.offset} to {end} of {part.global_numel} are "
                    f"asked for, the checkpoint holds {found} of them in {tuple(record.size)}."
                )
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor
