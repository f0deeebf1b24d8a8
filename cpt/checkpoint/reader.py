"""Reading of a run's checkpoints without an engine, a process group or DeepSpeed: which there are,
which are sound, and their tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from cpt.checkpoint.flat_planner import FlatLoadPlanner, FlatRange
from cpt.checkpoint.manifest import (
    Manifest,
    TensorRecord,
    check_listing,
    read_manifest,
    verify_files,
)
from cpt.checkpoint.metadata import FolderReader, check_metadata
from cpt.errors import CheckpointError, ConfigError

MOST_LISTED = 20
"""Checkpoints that a message lists."""
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
    """Return the steps to try, best first: all with a folder for `auto`, else the one asked for.

    Raises:
        ConfigError: the one asked for does not exist; the message lists those that do.
    """
    steps = list_steps(run_dir)
    if resume == "auto":
        return steps
    wanted = int(resume)
    if wanted not in steps:
        raise ConfigError(_no_such_step(run_dir, wanted, steps))
    return [wanted]


def _no_such_step(run_dir: Path, wanted: int, steps: list[int]) -> str:
    absent = f"{run_dir} has no checkpoint of step {wanted}"
    if not steps:
        return f"{absent}; it has none at all. Leave the step out, or give another --run_dir."
    cure = "Give it" if len(steps) == 1 else "Give one of them"
    return f"{absent}, only of {_listed(steps)}. {cure}, or no step for the newest."


def _listed(steps: list[int]) -> str:
    """Return steps in words; of very many, the newest."""
    shown = [str(step) for step in steps[:MOST_LISTED]]
    text = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    left = len(steps) - len(shown)
    more = f" ({left} older ones as well)" if left else ""
    return f"step{'s' if len(shown) > 1 else ''} {text}{more}"


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
        others = [step for step in list_steps(run_dir) if step not in steps]
        advice = (
            "Training does not restart at step 0 by itself. "
            "A fresh run beside the old one needs --resume never."
        )
        if others:
            advice = f"There are checkpoints of {_listed(others)}, too: ask for one of them."
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


def refusal_unread(folder: Path) -> str | None:
    """Return why a checkpoint is not to be used, as far as its manifest and file sizes tell."""

    def look() -> None:
        check_listing(folder, read_manifest(folder))

    return reason_of(look)


def check_same_tensors(
    checkpoint: str, stored: Mapping[str, TensorRecord], wanted: Mapping[str, TensorRecord]
) -> None:
    """Refuse a checkpoint whose parameters are not those of the model.

    Args:
        checkpoint: Its name.
        stored: Its tensors.
        wanted: Those of the model.

    Raises:
        CheckpointError: naming the first keys that differ.
    """
    problems = []
    for name in sorted(wanted.keys() - stored.keys()):
        problems.append(f"key '{name}' is missing.")
    for name in sorted(stored.keys() - wanted.keys()):
        problems.append(f"key '{name}' is unknown to this model.")
    for name in sorted(stored.keys() & wanted.keys()):
        if (stored[name].shape, stored[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            problems.append(
                f"key '{name}' is {stored[name].dtype} {stored[name].shape}, "
                f"expected {wanted[name].dtype} {wanted[name].shape}."
            )
    if problems:
        raise CheckpointError(f"{checkpoint} is of another model: " + " ".join(problems[:5]))


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
