"""What can be read of a run's checkpoints without an engine, a process group or DeepSpeed: which there are, which are
sound, and their tensors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from cpt.errors import CheckpointError
from cpt.state.flat_planner import FlatLoadPlanner, FlatRange
from cpt.state.manifest import Manifest, read_manifest, verify_files

PARTS = ("master", "exp_avg", "exp_avg_sq")
"""What is stored of every parameter: fp32 weights and Adam's two moments."""
_STEP_FOLDER = re.compile(r"step-(\d{8})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a folder, newest first, complete or not."""
    parent = run_dir / "checkpoints"
    found = [_STEP_FOLDER.fullmatch(entry.name) for entry in parent.iterdir()] if parent.is_dir() else []
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def find_checkpoint(run_dir: Path, resume: str) -> tuple[int | None, list[str]]:
    """The step to resume from, verified, and the reasons of those passed over; only rank 0 calls this.

    Args:
        run_dir: The run directory.
        resume: `auto` (newest verified, None if there is no folder at all) or a step number.

    Raises:
        CheckpointError: folders exist but none is good, or the asked-for step is not.
    """
    steps = list_steps(run_dir) if resume == "auto" else [int(resume)]
    rejected: list[str] = []
    for step in steps:
        folder = step_folder(run_dir, step)
        try:
            verify_files(folder, read_manifest(folder))
            return step, rejected
        except CheckpointError as error:
            rejected.append(str(error))
    if rejected:
        advice = "Training does not restart at step 0 by itself. A fresh run beside the old one needs --resume never."
        raise CheckpointError("\n".join(["no usable checkpoint:", *rejected, advice]))
    return None, []


def read_ranges(folder: Path, ranges: dict[str, FlatRange]) -> None:
    """Fill ranges from a checkpoint; each process plans its own reads, nothing is sent."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(ranges, storage_reader=dcp.FileSystemReader(folder), planner=FlatLoadPlanner(), no_dist=True)
    except (OSError, dcp.CheckpointException) as error:  # the latter is no Exception: peers would not be told
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
    flat = {name: torch.empty(torch.Size(manifest.tensors[name].shape).numel(), dtype=torch.float32) for name in names}
    ranges = {
        f"master/{name}": FlatRange(tensor=tensor, offset=0, global_numel=tensor.numel())
        for name, tensor in flat.items()
    }
    read_ranges(folder, ranges)
    return {name: tensor.view(manifest.tensors[name].shape) for name, tensor in flat.items()}
