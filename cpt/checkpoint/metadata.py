"""`.metadata`, the index of torch.distributed.checkpoint: written for its tools.

The file is a pickle, because torch.distributed.checkpoint and its tools read no other form. This
project does not read what it writes here: `ranges.json` says the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from cpt.checkpoint.range_index import WrittenRange
from data_pipeline.store.files import no_links


class _OwnFiles(FileSystem):
    """Opens files as everything here does, so that others never may write to them.

    A default ACL of a folder replaces the umask: what torch opens would have the mode 0664 there.
    """

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with open(path, mode, opener=no_links) as stream:
            yield cast(io.IOBase, stream)


class _MetadataWriter(dcp.FileSystemWriter):
    """Writes `.metadata` into a folder and syncs.

    The path that the folder had while it was written is not stored.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, overwrite=False)
        self.fs = _OwnFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_metadata(folder: Path, grouped: dict[str, list[WrittenRange]]) -> None:
    """Write `.metadata`.

    Args:
        folder: The folder of the checkpoint.
        grouped: What all ranks wrote; see `group_ranges`.
    """
    entries: dict[str, Any] = {}
    results = []
    for key, parts in grouped.items():
        chunks = [
            ChunkStorageMetadata(torch.Size([part.offset]), torch.Size([part.numel]))
            for part in parts
        ]
        properties = TensorProperties(dtype=torch.float32)
        entries[key] = TensorStorageMetadata(
            properties, torch.Size([parts[0].global_numel]), chunks
        )
        for number, part in enumerate(parts):
            where = _StorageInfo(part.file, part.file_offset, part.file_bytes)
            index = MetadataIndex(key, [part.offset], number)
            results.append(
                WriteResult(index=index, size_in_bytes=part.file_bytes, storage_data=where)
            )
    _MetadataWriter(folder).finish(Metadata(entries), [results])
