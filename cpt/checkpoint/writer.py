"""What goes into a checkpoint folder: one file of each rank, then `.metadata` and the manifest,
then its name.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpt.checkpoint.flat_planner import FlatRange, FlatSavePlanner
from cpt.checkpoint.manifest import FileRecord, Manifest, TensorRecord, record_file, write_manifest
from cpt.checkpoint.metadata import METADATA, FolderWriter, WrittenRange, write_metadata
from cpt.resilience.faults import fault_point
from cpt.storage.space import write_error
from data_pipeline.store.files import sync_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What one rank has put on disk."""

    file: FileRecord
    """Its file."""
    ranges: list[WrittenRange]
    """What is in it."""


def write_ranges(folder: Path, ranges: dict[str, FlatRange], rank: int, step: int) -> Written:
    """Write, sync and hash this rank's file; no other rank is needed."""
    fault_point("save_write", step)
    writer, planner = FolderWriter(folder), FlatSavePlanner()
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    planner.set_up_planner(ranges, is_coordinator=rank == 0)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    fault_point("save_hash", step)
    entries = []
    for result in results:
        part, where = ranges[result.index.fqn], result.storage_data
        place = (where.relative_path, where.offset, where.length)
        entries.append(
            WrittenRange(
                result.index.fqn, part.offset, part.tensor.numel(), part.global_numel, *place
            )
        )
    return Written(file=record_file(folder / f"__{rank}_0.distcp"), ranges=entries)


def complete_folder(
    folder: Path,
    parts: list[dict[str, Any]],
    *,
    step: int,
    layout: dict[str, int],
    tensors: dict[str, TensorRecord],
    state: dict[str, Any],
) -> None:
    """Write `.metadata` and the manifest; rank 0 does this once all ranks have written.

    Args:
        folder: Where the ranks have written.
        parts: `Written` of every rank, as plain values.
        step: See `Manifest`, as for the others.
        layout: Of the run.
        tensors: Global shapes.
        state: JSON values to restore.

    Raises:
        StorageError: the files could not be written.
    """
    try:
        write_metadata(folder, [WrittenRange(*entry) for part in parts for entry in part["ranges"]])
        files = [FileRecord(**part["file"]) for part in parts] + [record_file(folder / METADATA)]
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


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a complete folder its name, durably.

    Raises:
        StorageError: it could not be renamed.
    """
    try:
        if (
            final.exists()
        ):  # an incomplete directory of the same step: no manifest, so nothing that counts
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(final.parent)
    except OSError as error:
        raise write_error(error, final) from error


def written_by(rank: int, held: list[dict[str, list[int]]]) -> set[str]:
    """Which of its ranges a rank writes, so that each is written once and all write about equally
    much.

    Args:
        rank: Whose ranges.
        held: What every rank holds, by rank: key -> (offset, elements).

    Returns:
        Keys.  Frozen parameters are whole on every rank under ZeRO-1 and 2; all else has one
        holder.
    """
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    for holder, ranges in enumerate(held):
        for key, (offset, _) in ranges.items():
            holders[key, offset].append(holder)
    loads = [0] * len(held)
    writer = {}
    for (key, offset), ranks in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):
        writer[key, offset] = min(ranks, key=lambda holder: (loads[holder], holder))
        loads[writer[key, offset]] += held[ranks[0]][key][1]
    return {key for key, (offset, _) in held[rank].items() if writer[key, offset] == rank}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "deepspeed", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
