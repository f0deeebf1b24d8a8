"""What can be read of a run's checkpoints without an engine, a process group or DeepSpeed: which
there are, which are sound, and their tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from cpt.checkpoint.flat_planner import FlatLoadPlanner, FlatRange
from cpt.checkpoint.manifest import Manifest, read_manifest, verify_files
from cpt.checkpoint.metadata import PARTS as PARTS
from cpt.checkpoint.metadata import FolderReader, check_metadata
from cpt.errors import CheckpointError

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a folder, newest first, complete or not."""
    parent = run_dir / "checkpoints"
    found = (
        [_STEP_FOLDER.fullmatch(entry.name) for entry in parent.iterdir()]
        if parent.is_dir()
        else []
    )
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def find_checkpoint(run_dir: Path, resume: str) -> tuple[int | None, list[str]]:
    """The step to resume from, every file of it read by this process, and the reasons of those
    passed over.

    Raises:
        CheckpointError: see `first_sound`.
    """
    return first_sound(run_dir, candidates(run_dir, resume), refusal_of)


def candidates(run_dir: Path, resume: str) -> list[int]:
    """Steps to try, best first: all that have a folder for `auto`, else the one asked for."""
    return list_steps(run_dir) if resume == "auto" else [int(resume)]


def first_sound(
    run_dir: Path, steps: list[int], refusal: Callable[[Path], str | None]
) -> tuple[int | None, list[str]]:
    """The first sound step of a list, and the reasons of those passed over; None if the list is
    empty.

    Args:
        run_dir: The run directory.
        steps: See `candidates`.
        refusal: Why a folder is not to be used, or None if it is sound.

    Raises:
        CheckpointError: there are steps, but none is sound.
    """
    rejected: list[str] = []
    for step in steps:
        reason = refusal(step_folder(run_dir, step))
        if reason is None:
            return step, rejected
        rejected.append(reason)
    if rejected:
        advice = "Training does not restart at step 0 by itself. A fresh run beside the old one needs --resume never."
        raise CheckpointError("\n".join(["no usable checkpoint:", *rejected, advice]))
    return None, []


def refusal_of(folder: Path) -> str | None:
    """Why a checkpoint is not to be used; None if every file is the one that was written."""
    return reason_of(lambda: _verify(folder))


def _verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    check_metadata(folder, manifest)


def reason_of(check: Callable[[], object]) -> str | None:
    """What a check finds wrong, as text."""
    try:
        check()
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def read_ranges(folder: Path, ranges: dict[str, FlatRange]) -> None:
    """Fill ranges from a checkpoint; each process plans its own reads, nothing is sent."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                ranges, storage_reader=FolderReader(folder), planner=FlatLoadPlanner(), no_dist=True
            )
    except (
        OSError,
        dcp.CheckpointException,
    ) as error:  # the latter is no Exception: peers would not be told
        raise CheckpointError(f"{folder}: {root_cause(error)}") from error


def root_cause(error: BaseException) -> str:
    """What happened first inside torch.distributed.checkpoint, in one line."""
    failures = list(error.failures.values()) if isinstance(error, dcp.CheckpointException) else []
    first = failures[0][0] if failures else error
    return str(first) if isinstance(first, CheckpointError) else f"{type(first).__name__}: {first}"


def read_weights(folder: Path, names: list[str], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read whole fp32 master weights of some parameters, in a single process, without the engine.

    Args:
        folder: A verified checkpoint.
        names: Parameters to read; only these take memory.
        manifest: The checkpoint's manifest.
    """
    flat = {
        name: torch.empty(torch.Size(manifest.tensors[name].shape).numel(), dtype=torch.float32)
        for name in names
    }
    ranges = {
        f"master/{name}": FlatRange(tensor=tensor, offset=0, global_numel=tensor.numel())
        for name, tensor in flat.items()
    }
    read_ranges(folder, ranges)
    return {name: tensor.view(manifest.tensors[name].shape) for name, tensor in flat.items()}
