"""Loading: an engine is restored from a checkpoint by all ranks together.

A checkpoint is a set of flat global fp32 tensors, written and read by range, so it knows no layout.
The newest folder is tried first. All ranks together hash its files, and keys, shapes and dtypes are
compared both ways before any tensor is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import (
    Manifest,
    TensorRecord,
    check_hashes,
    check_listing,
    read_manifest,
    share_of_files,
)
from cpt.checkpoint.range_index import read_range_index
from cpt.checkpoint.reader import (
    candidates,
    check_same_tensors,
    fill_ranges,
    first_sound,
    list_steps,
    reason_of,
    step_folder,
)
from cpt.checkpoint.run_state import RunState
from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.fragments import global_offset
from cpt.deepspeed_adapter.partition import full_local_numel, full_local_shape
from cpt.deepspeed_adapter.shards import (
    local_shards,
    moments_by_parameter,
    publish_master_weights,
    set_optimizer_step,
)
from cpt.model.adapters.layout import is_adapter_name
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.storage.state_bytes import MOMENTS
from data_pipeline.store.ownership import refuse_foreign

log = logging.getLogger("cpt.checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedState:
    """The content of a loaded checkpoint besides its tensors."""

    step: int
    """Optimizer steps done."""
    state: RunState
    """State of the run besides tensors."""
    folder: Path
    """Folder of the checkpoint."""
    rejected: list[str]
    """Reasons why newer folders were passed over."""


def flat_ranges(engine: Any, topology: Topology) -> dict[str, FlatRange]:
    """Return this rank's range of every tensor, by key `part/parameter name`."""
    parameters = dict(engine.module.named_parameters())
    ranges = {}
    for name, shard in local_shards(engine).items():
        parameter = parameters[name]
        global_numel = full_local_numel(parameter)
        if is_expert(parameter):
            global_numel *= topology.ep_size
        offset = global_offset(parameter, shard.offset, topology.ep_rank)
        for part, tensor in shard.tensors.items():
            ranges[f"{part}/{name}"] = FlatRange(
                tensor=tensor,
                offset=offset,
                global_numel=global_numel,
                exponents=shard.exponents.get(part),
                signed=part == MOMENTS[0],
            )
    return ranges


def stored_names(engine: Any) -> set[str]:
    """Return the parameters that a checkpoint holds: those of the adapter, or all without one.

    The weights below an adapter stay as they are, in the files of the base.
    """
    names = {name for name, _ in engine.module.named_parameters()}
    return {name for name in names if is_adapter_name(name)} or names


def stored_ranges(engine: Any, topology: Topology) -> dict[str, FlatRange]:
    """Return this rank's range of every tensor that a checkpoint holds, as `flat_ranges` does."""
    names = stored_names(engine)
    ranges = {}
    for key, part in flat_ranges(engine, topology).items():
        if key.split("/", 1)[1] in names:
            ranges[key] = part
    return ranges


def tensor_records(engine: Any, topology: Topology) -> dict[str, TensorRecord]:
    """Return the record of the global tensor of every parameter that a checkpoint holds."""
    names = stored_names(engine)
    moments = moments_by_parameter(engine)
    records = {}
    for name, parameter in engine.module.named_parameters():
        if name not in names:
            continue
        shape = full_local_shape(parameter)
        if is_expert(parameter):
            shape = (shape[0] * topology.ep_size, *shape[1:])
        records[name] = TensorRecord(
            shape=shape,
            dtype="float32",
            trained=parameter.requires_grad,
            moments=tuple(moments.get(name, MOMENTS)),
        )
    return records


def load_checkpoint(
    run_dir: Path, engine: Any, topology: Topology, resume: str, *, set_aside: bool = True
) -> LoadedState | None:
    """Restore weights and optimizer state of a run; all ranks call it together.

    Of a run with an adapter, the adapter is restored: the weights below it come from the base.

    Unless `set_aside` is false, newer checkpoints are set aside, because the run will come to their
    steps again.

    Returns:
        The rest of the checkpoint; None if the run has no checkpoint folder yet.

    Raises:
        CheckpointError: no checkpoint is sound (see `first_sound`), or it is of another model.
    """
    group = topology.control_group
    steps = on_first_rank(group, lambda: candidates(run_dir, resume))
    wanted = tensor_records(engine, topology)
    step, rejected = first_sound(
        run_dir, steps, lambda folder: agreed_refusal(folder, topology, wanted)
    )
    if step is None:
        return None
    folder = step_folder(run_dir, step)
    manifest = together(group, lambda: read_manifest(folder))
    check_same_tensors(folder.name, manifest.tensors, wanted)
    state = RunState.of(manifest)
    engine.state_reading.wait()
    ranges = _filled_ranges(stored_ranges(engine, topology), manifest.tensors, wanted)
    if not state.begins_a_run:  # what was imported has no moments
        _log_freezing(manifest.tensors, wanted)
        _log_optimizers(manifest.tensors, wanted)
    together(group, lambda: fill_ranges(folder, read_range_index(folder, manifest), ranges))
    set_optimizer_step(engine, step)
    publish_master_weights(engine)
    engine.global_steps = step
    if set_aside:
        on_first_rank(group, lambda: set_newer_aside(run_dir, step, resume))
    return LoadedState(step=step, state=state, folder=folder, rejected=rejected)


def agreed_refusal(
    folder: Path, topology: Topology, wanted: Mapping[str, TensorRecord]
) -> str | None:
    """Return why a checkpoint is not to be used, or None; the same on all ranks.

    Each rank reads its share of the files.  Those of another model are not read, since their sizes
    may be anything; whether it is another one is not a reason here.

    Args:
        folder: The checkpoint.
        topology: The ranks.
        wanted: The tensors of the model.

    Raises:
        ConfigError: it is not this user's alone.
    """
    group = topology.control_group
    manifests: list[Manifest] = []

    def read_share() -> None:
        manifests.append(read_manifest(folder))
        if topology.rank == 0:
            check_listing(folder, manifests[0])
        if reason_of(lambda: check_same_tensors(folder.name, manifests[0].tensors, wanted)):
            return
        check_hashes(folder, share_of_files(manifests[0].files, topology.rank, topology.world_size))

    on_first_rank(group, lambda: refuse_foreign(folder, "checkpoint", in_run_dir=True))
    reasons = gather_json(reason_of(read_share), group)
    if not any(reasons):
        reasons = on_first_rank(
            group, lambda: [reason_of(lambda: read_range_index(folder, manifests[0]))]
        )
    reason = next((reason for reason in reasons if reason is not None), None)
    if topology.rank == 0 and reason is not None:
        log.warning("checkpoint rejected: %s", reason)
    return reason


def _filled_ranges(
    ranges: dict[str, FlatRange],
    stored: dict[str, TensorRecord],
    wanted: dict[str, TensorRecord],
) -> dict[str, FlatRange]:
    """Return the ranges that the checkpoint can fill.

    Moments of a parameter of which it does not hold all, because the parameter was frozen, comes
    from elsewhere or had another optimizer, are set to zero. A first moment without the second
    would do harm: AdamW would divide it by one step's gradient alone.
    """
    kept = {}
    for key, part in ranges.items():
        kind, name = key.split("/", 1)
        if kind == "master" or set(wanted[name].parts) <= set(stored[name].parts):
            kept[key] = part
        else:
            part.zero_()
    return kept


def _log_freezing(stored: dict[str, TensorRecord], wanted: dict[str, TensorRecord]) -> None:
    """Warn of parameters that were frozen when the checkpoint was written and are not now, and of
    the reverse.
    """
    thawed = []
    frozen = []
    for name in sorted(wanted):
        if wanted[name].trained and not stored[name].trained:
            thawed.append(name)
        elif stored[name].trained and not wanted[name].trained:
            frozen.append(name)
    if thawed:
        log.warning(
            "%d tensors are no longer frozen, their moments start at zero: %s",
            len(thawed),
            shorten(thawed),
        )
    if frozen:
        log.warning(
            "%d tensors are frozen from here on, in working precision and without moments: %s",
            len(frozen),
            shorten(frozen),
        )


def _log_optimizers(stored: dict[str, TensorRecord], wanted: dict[str, TensorRecord]) -> None:
    """Tell which parameters have another optimizer than when the checkpoint was written."""
    to_muon = []
    to_adamw = []
    for name in sorted(wanted):
        if not (wanted[name].trained and stored[name].trained):
            continue
        before = set(stored[name].moments)
        now = set(wanted[name].moments)
        if now < before:
            to_muon.append(name)
        elif not now <= before:
            to_adamw.append(name)
    if to_muon:
        log.info(
            "%d tensors are trained by Muon from here on; their momentum goes on from AdamW's "
            "first moment: %s",
            len(to_muon),
            shorten(to_muon),
        )
    if to_adamw:
        log.info(
            "%d tensors are trained by AdamW from here on, their moments start at zero: %s",
            len(to_adamw),
            shorten(to_adamw),
        )


def shorten(names: list[str]) -> str:
    """Return the first few names, for a log."""
    shown = names[:3]
    if len(names) > 3:
        shown.append("...")
    return ", ".join(shown)


def set_newer_aside(run_dir: Path, step: int, resume: str) -> None:
    """Rename the folders of newer steps, and those of their exports.

    The run will reach these steps again, and the folders must not be taken for its own. A
    checkpoint set aside is deleted once a newer one takes its place (`cpt.checkpoint.pruning`). An
    export never is: nothing else may hold these weights, and nobody may export the step again.
    """
    kind = "rejected" if resume == "auto" else "superseded"
    for newer in list_steps(run_dir):
        if newer <= step:
            break  # the list begins with the newest
        folder = step_folder(run_dir, newer)
        aside = _set_aside(folder, kind)
        log.warning("%s is set aside as %s", folder.name, aside.name)
        export = run_dir / "export" / folder.name
        if export.exists():
            aside = _set_aside(export, kind)
            log.warning("its export is set aside as export/%s, and stays there", aside.name)


def _set_aside(folder: Path, kind: str) -> Path:
    """Give a folder a name that no step has, and return it."""
    aside = folder.with_name(f".{kind}-{folder.name}")
    number = 2
    while aside.exists():
        aside = folder.with_name(f".{kind}-{folder.name}-{number}")
        number += 1
    folder.rename(aside)
    return aside
