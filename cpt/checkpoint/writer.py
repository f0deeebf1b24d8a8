"""Writing of a checkpoint's folder: the files of each rank, then `.metadata`, `ranges.json` and the
manifest, then the folder's final name.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cpt.checkpoint.archives import write_archive
from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import (
    METADATA,
    RANGES,
    FileRecord,
    Manifest,
    TensorRecord,
    record_file,
    write_manifest,
)
from cpt.checkpoint.metadata import write_metadata
from cpt.checkpoint.range_index import WrittenRange, group_ranges, write_range_index
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.write_buffer import HashedFile, WriteBuffer
from cpt.parallel.division import divide
from cpt.resilience.faults import fault_point
from cpt.storage.space import check_checkpoint_space, write_error
from data_pipeline.store.files import FOLDER_MODE, make_folder, no_links, sync_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One file of a rank, on disk."""

    file: FileRecord
    """Its name, size and hash."""
    ranges: list[WrittenRange]
    """Ranges of tensors in it."""
    is_linked: bool = False
    """Whether it is a file of an earlier checkpoint under a second name."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, for `complete_folder`."""
        return {"file": asdict(self.file), "ranges": self.ranges, "is_linked": self.is_linked}


def write_ranges(
    folder: Path,
    ranges: dict[str, FlatRange],
    rank: int,
    step: int,
    *,
    buffer: WriteBuffer | None = None,
    when_read: Callable[[], None] | None = None,
) -> Written:
    """Write, sync and hash this rank's file; no other rank is needed.

    Args:
        folder: The folder of the checkpoint.
        ranges: What this rank writes, by key `part/parameter name`.
        rank: This rank.
        step: Optimizer steps done.
        buffer: The memory through which values pass.
        when_read: Called once all values have been read, before the file is synced.
    """
    fault_point("save_write", step)
    path = folder / shard_name(rank)
    written = write_shard(path, ranges, buffer or WriteBuffer(), when_read=when_read)
    fault_point("save_hash", step)
    return written


def shard_name(rank: int, *, frozen: bool = False) -> str:
    """Return the name of a rank's file, or of the one with its part of the frozen parameters."""
    return f"__{rank}_{int(frozen)}.distcp"


def write_shard(
    path: Path,
    ranges: dict[str, FlatRange],
    buffer: WriteBuffer,
    *,
    when_read: Callable[[], None] | None = None,
) -> Written:
    """Write and sync one file of ranges; see `write_ranges`."""
    with open(path, "xb", buffering=0, opener=no_links) as file:
        written = _pass_through(HashedFile(file), path.name, ranges, buffer)
        if when_read is not None:
            when_read()
        os.fsync(file.fileno())
    return written


def would_write(name: str, ranges: dict[str, FlatRange], buffer: WriteBuffer) -> Written:
    """Return what `write_shard` would write under a name, without writing it."""
    return _pass_through(HashedFile(None), name, ranges, buffer)


def _pass_through(
    sink: HashedFile, name: str, ranges: dict[str, FlatRange], buffer: WriteBuffer
) -> Written:
    entries = []
    for key, part in ranges.items():
        start = sink.num_bytes
        numel = part.tensor.numel()
        values_offset = write_archive(sink, numel, buffer.pieces(part))
        entries.append(
            WrittenRange(
                key=key,
                offset=part.offset,
                numel=numel,
                global_numel=part.global_numel,
                file=name,
                file_offset=start,
                file_bytes=sink.num_bytes - start,
                values_offset=values_offset,
            )
        )
    return Written(file=sink.record(name), ranges=entries)


def complete_folder(
    folder: Path,
    parts: list[dict[str, Any]],
    *,
    step: int,
    layout: dict[str, int],
    tensors: dict[str, TensorRecord],
    state: dict[str, Any],
) -> None:
    """Write `.metadata`, `ranges.json` and the manifest.

    Rank 0 does this once all ranks have written.

    Args:
        folder: The folder in which the ranks have written.
        parts: `Written` of every file of every rank, as plain values.
        step: Optimizer steps done.
        layout: Sizes of the run's layout; see `Manifest`.
        tensors: Record of each parameter by name.
        state: JSON values to restore besides the tensors.

    Raises:
        StorageError: the files could not be written.
    """
    try:
        ranges: list[WrittenRange] = []
        files: list[FileRecord] = []
        for part in parts:
            ranges += [WrittenRange(*entry) for entry in part["ranges"]]
            files.append(FileRecord(**part["file"]))
        grouped = group_ranges(ranges)
        write_metadata(folder, grouped)
        write_range_index(folder, grouped)
        files += [record_file(folder / METADATA), record_file(folder / RANGES)]
        manifest = Manifest(
            step=step,
            files=tuple(sorted(files, key=lambda record: record.name)),
            tensors=tensors,
            layout=layout,
            versions=versions(),
            state=state,
        )
        write_manifest(folder, manifest)
    except OSError as error:
        raise write_error(error, folder) from error


def write_alone(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    records: Mapping[str, TensorRecord],
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint in one process, without an engine.

    Args:
        run_dir: The run directory; it holds no checkpoint of this step.
        step: Optimizer steps done.
        tensors: Whole fp32 tensors by key `part/parameter name`.
        records: Record of each parameter by name.
        state: JSON values to restore besides the tensors.

    Returns:
        The folder of the checkpoint.

    Raises:
        StorageError: it could not be written; nothing is left behind.
    """
    final = step_folder(run_dir, step)
    temporary = final.with_name(f".tmp-{final.name}")
    needed = sum(record.stored_bytes for record in records.values())
    ranges = {}
    for key, tensor in tensors.items():
        ranges[key] = FlatRange(tensor=tensor.view(-1), offset=0, global_numel=tensor.numel())
    try:
        make_folder(final.parent)
        check_checkpoint_space(final.parent, needed, largest_file_bytes=needed)
        temporary.mkdir(mode=FOLDER_MODE)
        written = write_ranges(temporary, ranges, 0, step)
        parts = [written.to_json()]
        layout = {"world_size": 1, "sp_size": 1, "ep_size": 1, "zero_stage": 0}
        complete_folder(
            temporary, parts, step=step, layout=layout, tensors=dict(records), state=state
        )
        publish_folder(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, final.parent) from error
        raise
    return final


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a complete folder its name, durably.

    Raises:
        StorageError: it could not be renamed.
    """
    try:
        if final.exists():
            # A folder of the same step without a manifest does not count.
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(final.parent)
    except OSError as error:
        raise write_error(error, final) from error


def written_by(rank: int, held: list[dict[str, list[int]]]) -> set[str]:
    """Return which of its ranges a rank writes, so that each is written once and all ranks write
    about as much.

    Args:
        rank: The rank whose ranges are returned.
        held: The ranges that every rank holds, by rank: key -> (offset, elements).

    Returns:
        Keys of ranges. Frozen parameters are whole on every rank under ZeRO-1 and 2; everything
        else has one holder.
    """
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    sizes: dict[tuple[str, int], int] = {}
    for holder, ranges in enumerate(held):
        for key, (offset, numel) in ranges.items():
            holders[key, offset].append(holder)
            sizes[key, offset] = numel
    return {key for key, _ in divide(sizes, holders, len(held))[rank]}


def versions() -> dict[str, str]:
    """Return the versions of the software that decides the numbers."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
    }
