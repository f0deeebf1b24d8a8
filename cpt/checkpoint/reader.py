"""Reading of a run's checkpoints without an engine, a process group or DeepSpeed: which there are,
which are sound, and their tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from cpt.checkpoint.flat_planner import FlatLoadPlanner, FlatRange
from cpt.checkpoint.manifest import Manifest, read_manifest, verify_files
from cpt.checkpoint.metadata import FolderReader, check_metadata
from cpt.errors import CheckpointError

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a folder, newest first, complete or not."""
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return []
    steps = []
    for entry in parent.iterdir():
        match = _STEP_FOLDER.fullmatch(entry.name)
        if match:
            steps.append(int(match.group(1)))
    return sorted(steps, reverse=True)


def find_checkpoint(run_dir: Path, resume: str) -> tuple[int | None, list[str]]:
    """Return the step to resume from, and the reasons why newer ones were passed over.

    This process reads every file of the checkpoints that it looks at.

    Raises:
        CheckpointError: see `first_sound`.
    """
    return first_sound(run_dir, candidates(run_dir, resume), refusal_of)


def candidates(run_dir: Path, resume: str) -> list[int]:
    """Return the steps to try, best first: all with a folder for `auto`, else the one asked for."""
    return list_steps(run_dir) if resume == "auto" else [int(resume)]


def first_sound(
    run_dir: Path, steps: list[int], refusal: Callable[[Path], str | None]
) -> tuple[int | None, list[str]]:
    """Return the first sound step of a list, and the reasons why others were passed over.

    The step is None if the list is empty.

    Args:
        run_dir: The run directory.
        steps: Steps to try; see `candidates`.
        refusal: Returns why a folder is not to be used, or None if it is sound.

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
        advice = (
            "Training does not restart at step 0 by itself. "
            "A fresh run beside the old one needs --resume never."
        )
        raise CheckpointError("\n".join(["no usable checkpoint:", *rejected, advice]))
    return None, []


def refusal_of(folder: Path) -> str | None:
    """Return why a checkpoint is not to be used; None if every file is the one that was written."""
    return reason_of(lambda: _verify(folder))


def _verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    check_metadata(folder, manifest)


def reason_of(check: Callable[[], object]) -> str | None:
    """Run a check and return what it finds wrong; None if it finds nothing."""
    try:
        check()
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def read_ranges(folder: Path, ranges: dict[str, FlatRange]) -> None:
    """Fill ranges from a checkpoint; each process plans its own reads, and nothing is sent.

    Raises:
        CheckpointError: a file cannot be read, or does not hold a range.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                ranges, storage_reader=FolderReader(folder), planner=FlatLoadPlanner(), no_dist=True
            )
    except (OSError, dcp.CheckpointException) as error:
        # CheckpointException is no Exception, so that the other ranks would not learn of it.
        raise CheckpointError(f"{folder}: {root_cause(error)}") from error


def root_cause(error: BaseException) -> str:
    """Return what happened first inside torch.distributed.checkpoint, in one line."""
    first = error
    if isinstance(error, dcp.CheckpointException):
        for failure, _ in error.failures.values():
            first = failure
            break
    if isinstance(first, CheckpointError):
        return str(first)
    return f"{type(first).__name__}: {first}"


def read_weights(folder: Path, names: list[str], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return whole fp32 master weights of some parameters, read by a single process.

    Args:
        folder: A verified checkpoint.
        names: Parameters to read; only these take memory.
        manifest: The checkpoint's manifest.
    """
    tensors = {}
    ranges = {}
    for name in names:
        tensor = torch.empty(manifest.tensors[name].shape, dtype=torch.float32)
        tensors[name] = tensor
        ranges[f"master/{name}"] = FlatRange(
            tensor=tensor.view(-1), offset=0, global_numel=tensor.numel()
        )
    read_ranges(folder, ranges)
    return tensors
