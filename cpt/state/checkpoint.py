"""Checkpoints that know no layout: flat global fp32 tensors, written and read by range.

Save: fresh `.tmp-step-*` folder -> each rank writes its ranges -> each hashes what it wrote -> rank 0 writes the
manifest and renames.  Load: newest verified directory first; keys and shapes are compared both ways before any tensor
is read.  Nothing random happens inside a step, so there is no random state to save.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from cpt import deepspeed_internals
from cpt.errors import CheckpointError, StorageError
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.state.flat_planner import FlatRange, FlatSavePlanner
from cpt.state.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    TensorRecord,
    read_manifest,
    record_file,
    sync_folder,
    write_manifest,
)
from cpt.state.stored import PARTS, find_checkpoint, list_steps, read_ranges, root_cause, step_folder

log = logging.getLogger("cpt.checkpoint")
_OWN_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedState:
    """What a checkpoint says besides its tensors."""

    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """The JSON values given to `save_checkpoint`."""
    folder: Path
    """Where it came from."""
    rejected: list[str]
    """Newer directories that were passed over, each with its reason."""


def flat_ranges(engine: Any, topology: Topology) -> dict[str, FlatRange]:
    """This rank's part of every stored tensor, keyed `part/parameter name`."""
    parameters = dict(engine.module.named_parameters())
    ranges = {}
    for name, shard in deepspeed_internals.local_shards(engine).items():
        parameter = parameters[name]
        local_numel = deepspeed_internals.full_local_numel(parameter)
        expert = deepspeed_internals.is_expert(parameter)
        first = topology.ep_rank * local_numel if expert else 0
        for part, tensor in shard.tensors.items():
            ranges[f"{part}/{name}"] = FlatRange(
                tensor=tensor,
                offset=first + shard.offset,
                global_numel=local_numel * (topology.ep_size if expert else 1),
            )
    return ranges


def tensor_records(engine: Any, topology: Topology) -> dict[str, TensorRecord]:
    """Global shape of every parameter."""
    records = {}
    for name, parameter in engine.module.named_parameters():
        shape = deepspeed_internals.full_local_shape(parameter)
        if deepspeed_internals.is_expert(parameter):
            shape = (shape[0] * topology.ep_size, *shape[1:])
        records[name] = TensorRecord(shape=shape, dtype="float32", trained=parameter.requires_grad)
    return records


def save_checkpoint(
    run_dir: Path, engine: Any, topology: Topology, *, step: int, state: dict[str, Any], keep_last: int
) -> Path:
    """Write one checkpoint; all ranks call it together.

    Args:
        run_dir: The run directory.
        engine: The DeepSpeed engine.
        topology: The layout.
        step: Optimizer steps done.
        state: JSON values to restore besides the tensors.
        keep_last: Complete checkpoints to keep, this one included.

    Returns:
        The published folder.  A complete checkpoint of the same step is left as it is.

    Raises:
        StorageError: a rank could not write; nothing was published and nothing older was touched.
    """
    final, group = step_folder(run_dir, step), topology.control_group
    temporary = final.with_name(f".tmp-{final.name}")
    if on_first_rank(group, lambda: (final / MANIFEST).is_file()):
        return final
    try:
        on_first_rank(group, lambda: _prepare(run_dir, temporary, topology, engine))
        own = together(group, lambda: _write_shards(temporary, engine, topology))
        records = [FileRecord(**record) for rank in gather_json([asdict(r) for r in own], group) for record in rank]
        manifest = Manifest(
            step=step,
            files=tuple(sorted(records, key=lambda record: record.name)),
            tensors=tensor_records(engine, topology),
            layout={
                "world_size": topology.world_size,
                "sp_size": topology.sp_size,
                "ep_size": topology.ep_size,
                "zero_stage": engine.zero_optimization_stage(),
            },
            versions=versions(),
            state=state,
        )
        on_first_rank(group, lambda: _publish(temporary, final, manifest))
    except Exception:
        if topology.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if topology.rank == 0:
        prune(run_dir, keep_last, keep=step)
    return final


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "deepspeed", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _prepare(run_dir: Path, temporary: Path, topology: Topology, engine: Any) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for stale in temporary.parent.glob(".tmp-step-*"):
        shutil.rmtree(stale)
    records = tensor_records(engine, topology).values()
    numel = sum(_numel(record.shape) * (len(PARTS) if record.trained else 1) for record in records)
    needed, free = int(1.2 * 4 * numel), shutil.disk_usage(temporary.parent).free
    if free < needed:
        raise StorageError(f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free at {run_dir}.")
    temporary.mkdir()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _write_shards(temporary: Path, engine: Any, topology: Topology) -> list[FileRecord]:
    writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True, overwrite=False)
    try:
        dcp.save(
            flat_ranges(engine, topology),
            storage_writer=writer,
            planner=FlatSavePlanner(),
            process_group=topology.control_group,
        )
    except (OSError, dcp.CheckpointException) as error:
        raise StorageError(f"writing {temporary} failed: {root_cause(error)}") from error
    names = [entry.name for entry in os.scandir(temporary)]
    own = [name for name in names if (m := _OWN_FILE.fullmatch(name)) and int(m.group(1)) == topology.rank]
    if topology.rank == 0:
        own.append(".metadata")
    return [record_file(temporary / name) for name in own]


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    if final.exists():  # an incomplete directory of the same step: no manifest, so nothing that counts
        shutil.rmtree(final)
    write_manifest(temporary, manifest)
    os.rename(temporary, final)
    sync_folder(final.parent)


def prune(run_dir: Path, keep_last: int, *, keep: int) -> None:
    """Delete all but the newest complete checkpoints; the manifest goes first, so a crash leaves no half truth."""
    complete = [step for step in list_steps(run_dir) if (step_folder(run_dir, step) / MANIFEST).is_file()]
    for step in complete[keep_last:]:
        if step == keep:
            continue
        folder = step_folder(run_dir, step)
        try:
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)
        except OSError as error:
            warnings.warn(f"could not delete {folder}: {error.strerror}", stacklevel=2)
    for rejected in (run_dir / "checkpoints").glob(".rejected-step-*"):
        shutil.rmtree(rejected, ignore_errors=True)  # damaged, and now there is a newer one


def load_checkpoint(run_dir: Path, engine: Any, topology: Topology, resume: str) -> LoadedState | None:
    """Restore weights and optimizer state of a run; all ranks call it together.

    Returns:
        What else the checkpoint holds; None if the run has no checkpoint folder yet.

    Raises:
        CheckpointError: see `find_checkpoint`; or the checkpoint is of another model, naming the key.
    """
    step, rejected = on_first_rank(topology.control_group, lambda: find_checkpoint(run_dir, resume))
    for reason in rejected:
        log.warning("checkpoint rejected: %s", reason)
    if step is None:
        return None
    folder = step_folder(run_dir, step)
    manifest = read_manifest(folder)
    _compare(folder, manifest.tensors, tensor_records(engine, topology))
    ranges = _stored_ranges(flat_ranges(engine, topology), manifest.tensors)
    _tell_freezing(manifest.tensors, tensor_records(engine, topology))
    together(topology.control_group, lambda: read_ranges(folder, ranges))
    deepspeed_internals.set_optimizer_step(engine, step)
    deepspeed_internals.publish_master_weights(engine)
    engine.global_steps = step
    on_first_rank(topology.control_group, lambda: _set_newer_aside(run_dir, step, resume))
    return LoadedState(step=step, state=manifest.state, folder=folder, rejected=rejected)


def _stored_ranges(ranges: dict[str, FlatRange], stored: dict[str, TensorRecord]) -> dict[str, FlatRange]:
    """The ranges that the checkpoint can fill; moments of what was frozen when it was written start at zero."""
    kept = {}
    for key, part in ranges.items():
        kind, name = key.split("/", 1)
        if kind == "master" or stored[name].trained:
            kept[key] = part
        else:
            part.tensor.zero_()
    return kept


def _tell_freezing(stored: dict[str, TensorRecord], wanted: dict[str, TensorRecord]) -> None:
    thawed = sorted(name for name in wanted if wanted[name].trained and not stored[name].trained)
    frozen = sorted(name for name in wanted if stored[name].trained and not wanted[name].trained)
    if thawed:
        log.warning("%d tensors are frozen no more, their moments start at zero: %s", len(thawed), shorten(thawed))
    if frozen:
        log.warning(
            "%d tensors are frozen from here on, in working precision and without moments: %s",
            *(len(frozen), shorten(frozen)),
        )


def shorten(names: list[str]) -> str:
    """The first few names, for a log."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _set_newer_aside(run_dir: Path, step: int, resume: str) -> None:
    """The run will reach the steps of newer folders again; they must not be taken for its own."""
    kind = "rejected" if resume == "auto" else "superseded"
    for newer in [found for found in list_steps(run_dir) if found > step]:
        folder = step_folder(run_dir, newer)
        aside = folder.with_name(f".{kind}-{folder.name}")
        number = 2
        while aside.exists():
            aside = folder.with_name(f".{kind}-{folder.name}-{number}")
            number += 1
        folder.rename(aside)
        export = run_dir / "export" / folder.name
        if export.exists():  # of the weights just set aside; the step will be exported anew
            export.rename(aside / "export")
        log.warning("%s is set aside as %s", folder.name, aside.name)


def _compare(folder: Path, stored: dict[str, TensorRecord], wanted: dict[str, TensorRecord]) -> None:
    problems = [f"key '{name}' is missing." for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"key '{name}' is unknown to this model." for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(stored.keys() & wanted.keys()):
        if (stored[name].shape, stored[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            problems.append(
                f"key '{name}' is {stored[name].dtype} {stored[name].shape}, "
                f"expected {wanted[name].dtype} {wanted[name].shape}."
            )
    if problems:
        raise CheckpointError(f"{folder.name} is of another model: " + " ".join(problems[:5]))
