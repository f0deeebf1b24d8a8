"""`.metadata`, the index of torch.distributed.checkpoint: built from the ranges that the ranks
wrote, and read without trust.

The file is a pickle, because torch.distributed.checkpoint and its tools read no other form. Its
hash is checked before it is opened, and the unpickler knows only the classes that describe tensors:
a pickle that names anything else is refused before it can run. This is the one place of the project
that unpickles.
"""

from __future__ import annotations

import math
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

from cpt.checkpoint.manifest import Manifest, TensorRecord
from cpt.errors import CheckpointError, InternalError

METADATA = ".metadata"
PARTS = ("master", "exp_avg", "exp_avg_sq")
"""Tensors that are stored of a trained parameter: fp32 weights and Adam's two moments. Of a frozen
parameter only the first is stored.
"""
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_KNOWN_NAMES = frozenset(
    {
        (_METADATA_MODULE, "BytesStorageMetadata"),
        (_METADATA_MODULE, "ChunkStorageMetadata"),
        (_METADATA_MODULE, "Metadata"),
        (_METADATA_MODULE, "MetadataIndex"),
        (_METADATA_MODULE, "StorageMeta"),
        (_METADATA_MODULE, "TensorProperties"),
        (_METADATA_MODULE, "TensorStorageMetadata"),
        (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch.serialization", "_get_layout"),
    }
)
"""The (module, name) pairs that our own `.metadata` files refer to."""


class WrittenRange(NamedTuple):
    """One range of a tensor and its place in a file; it travels between ranks as a JSON list."""

    key: str
    """Part and parameter name, joined by a slash."""
    offset: int
    """First element in the flattened global tensor."""
    numel: int
    """Number of elements."""
    global_numel: int
    """Number of elements of the global tensor."""
    file: str
    """Name of the file."""
    file_offset: int
    """First byte in the file."""
    file_bytes: int
    """Bytes in the file."""


class FolderWriter(dcp.FileSystemWriter):
    """Writes into a fresh folder and syncs.

    The path that the folder had while it was written is not stored.
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
    """Refuse ranges, sorted by offset, that do not cover the tensor exactly once."""
    global_numel = parts[0].global_numel
    covered = 0
    has_gap_or_overlap = False
    for part in parts:
        has_gap_or_overlap |= part.offset != covered
        covered = part.offset + part.numel
    if has_gap_or_overlap or covered != global_numel:
        raise InternalError(
            f"the ranks' ranges of '{key}' do not cover its {global_numel} elements once."
        )


class _DescriptionUnpickler(pickle.Unpickler):
    """An unpickler that builds descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN_NAMES:
            raise CheckpointError(
                f"it names {module}.{name}, which describes no tensor; it was not run."
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`, whose hash has been checked.

    Raises:
        CheckpointError: the file does not describe tensors, or names something that could run.
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
    """Compare `.metadata` with the manifest.

    Both must have the same tensors, sizes and dtypes, in no other files than those listed.

    Raises:
        CheckpointError: they differ.
    """
    where = f"{folder.name}/{METADATA}"
    metadata = read_metadata(folder)
    wanted = _stored_tensors(manifest)
    stored = metadata.state_dict_metadata
    different = sorted(stored.keys() ^ wanted.keys())
    if different:
        raise CheckpointError(f"{where}: '{different[0]}' is not in both it and the manifest.")
    for key, entry in stored.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{where}: '{key}' is stored as bytes, not as a tensor; such entries are not read."
            )
        size = tuple(entry.size)
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        numel = math.prod(wanted[key].shape)
        if size != (numel,) or dtype != wanted[key].dtype:
            raise CheckpointError(
                f"{where}: '{key}' is {dtype} {size}, the manifest says {wanted[key].dtype} "
                f"({numel},)."
            )
    listed = {record.name for record in manifest.files}
    strange = {info.relative_path for info in metadata.storage_data.values()} - listed
    if strange:
        raise CheckpointError(f"{where}: points to '{min(strange)}', which is not in the manifest.")


def _stored_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """Return the record of every stored tensor by its key, `part/parameter name`."""
    wanted = {}
    for name, record in manifest.tensors.items():
        parts = PARTS if record.trained else PARTS[:1]
        for part in parts:
            wanted[f"{part}/{name}"] = record
    return wanted


class FolderReader(dcp.FileSystemReader):
    """A reader of verified folders that reads `.metadata` through `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
