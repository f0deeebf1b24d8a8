"""`.metadata` of torch.distributed.checkpoint: built from what each rank wrote, read without
trusting it.

The file is a pickle, because torch.distributed.checkpoint and its tools read no other form.  Its
hash is checked before it is opened, and the unpickler knows only the classes that describe tensors:
a pickle that names anything else is refused before it can run.  This is the one place of the
project that unpickles.
"""

from __future__ import annotations

import itertools
import pickle
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from cpt.checkpoint.manifest import Manifest
from cpt.errors import CheckpointError, InternalError

METADATA = ".metadata"
PARTS = ("master", "exp_avg", "exp_avg_sq")
"""What is stored of every trained parameter: fp32 weights and Adam's two moments; of a frozen one
the first alone.
"""
_KNOWN = {
    **{
        ("torch.distributed.checkpoint.metadata", name): None
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): None,
    ("torch", "Size"): None,
    ("torch", "float32"): None,
    ("torch.serialization", "_get_layout"): None,
}
"""All that our own `.metadata` files name."""


class WrittenRange(NamedTuple):
    """One range of a tensor, and where in which file it is; travels between ranks as a JSON
    list.
    """

    key: str
    """`part/parameter name`."""
    offset: int
    """First element in the flattened global tensor."""
    numel: int
    """Elements."""
    global_numel: int
    """Elements of the global tensor."""
    file: str
    """Name of the file."""
    file_offset: int
    """First byte in the file."""
    file_bytes: int
    """Bytes in the file."""


class FolderWriter(dcp.FileSystemWriter):
    """Writes into a fresh folder and syncs; says nothing about the path it had while it was
    written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, overwrite=False)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_metadata(folder: Path, written: Iterable[WrittenRange]) -> None:
    """Write `.metadata` from what all ranks wrote.

    Raises:
        InternalError: the ranges do not cover each tensor exactly once.
    """
    ranges: dict[str, list[WrittenRange]] = defaultdict(list)
    for one in written:
        ranges[one.key].append(one)
    entries: dict[str, Any] = {}
    results = []
    for key, parts in sorted(ranges.items()):
        parts.sort(key=lambda part: part.offset)
        _check_tiling(key, parts)
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
    FolderWriter(folder).finish(Metadata(entries), [results])


def _check_tiling(key: str, parts: list[WrittenRange]) -> None:
    ends = [0, *itertools.accumulate(part.numel for part in parts)]
    if [part.offset for part in parts] != ends[:-1] or ends[-1] != parts[0].global_numel:
        raise InternalError(
            f"the ranks' ranges of '{key}' do not cover its {parts[0].global_numel} elements once."
        )


class _DescriptionUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise CheckpointError(
                f"it names {module}.{name}, which describes no tensor; it was not run."
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`; its hash has been checked.

    Raises:
        CheckpointError: it is no description of tensors, or names something that could run.
    """
    where = f"{folder.name}/{METADATA}"
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _DescriptionUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:  # damaged pickles fail in every way there is
        raise CheckpointError(
            f"{where}: not readable ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(
            f"{where}: holds a {type(metadata).__name__}, not the description of a checkpoint."
        )
    return metadata


def check_metadata(folder: Path, manifest: Manifest) -> None:
    """Compare `.metadata` with the manifest: the same tensors, sizes and dtypes, in listed files
    only.

    Raises:
        CheckpointError: it says something else.
    """
    where, metadata = f"{folder.name}/{METADATA}", read_metadata(folder)
    wanted = {
        f"{part}/{name}": record
        for name, record in manifest.tensors.items()
        for part in (PARTS if record.trained else PARTS[:1])
    }
    stored = metadata.state_dict_metadata
    if different := sorted(stored.keys() ^ wanted.keys()):
        raise CheckpointError(f"{where}: '{different[0]}' is not in both it and the manifest.")
    for key, entry in stored.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{where}: '{key}' is stored as bytes, not as a tensor; such entries are not read."
            )
        size, dtype = tuple(entry.size), str(entry.properties.dtype).removeprefix("torch.")
        numel = torch.Size(wanted[key].shape).numel()
        if size != (numel,) or dtype != wanted[key].dtype:
            raise CheckpointError(
                f"{where}: '{key}' is {dtype} {size}, the manifest says {wanted[key].dtype} ({numel},)."
            )
    listed = {record.name for record in manifest.files}
    strange = {info.relative_path for info in metadata.storage_data.values()} - listed
    if strange:
        raise CheckpointError(f"{where}: points to '{min(strange)}', which is not in the manifest.")


class FolderReader(dcp.FileSystemReader):
    """Reads a folder whose files have been verified; `.metadata` through `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
