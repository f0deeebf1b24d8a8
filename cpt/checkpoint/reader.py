"""Reading of a run's checkpoints without an engine, a process group or DeepSpeed: which there are,
which are sound, and their tensors.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpt.checkpoint.archives import values_offset
from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import (
    Manifest,
    TensorRecord,
    check_listing,
    read_manifest,
    verify_files,
)
from cpt.checkpoint.range_index import RangeIndex, read_range_index
from cpt.errors import CheckpointError, ConfigError
from cpt.storage.state_bytes import FP32_BYTES
from data_pipeline.bounded.files import open_regular
from data_pipeline.escaping import escaped_line
from data_pipeline.store.files import AtChunk, no_call
from data_pipeline.store.ownership import refuse_foreign

MOST_LISTED = 20
"""Checkpoints that a message lists."""
Floats = npt.NDArray[np.float32]

_READ_NUMEL = 2**22
"""Elements read at once: 16 MB of memory besides what is filled."""
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
        ConfigError: one of them is not this user's alone.
    """

    def refusal(folder: Path) -> str | None:
        refuse_foreign(folder, "checkpoint", in_run_dir=True)
        return refusal_of(folder)

    return first_sound(run_dir, candidates(run_dir, resume), refusal)


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


def refusal_of(folder: Path, at_chunk: AtChunk = no_call) -> str | None:
    """Return why a checkpoint is not to be used; None if every file is the one that was written.

    Args:
        folder: The checkpoint.
        at_chunk: See `AtChunk`.
    """
    return reason_of(lambda: _verify(folder, at_chunk))


def _verify(folder: Path, at_chunk: AtChunk) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest, at_chunk)
    read_range_index(folder, manifest)


def reason_of(check: Callable[[], object]) -> str | None:
    """Run a check and return what it finds wrong; None if it finds nothing."""
    try:
        check()
    except (CheckpointError, OSError) as error:
        return escaped_line(error)  # it may name a file that nobody here has named
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


def read_ranges(folder: Path, index: RangeIndex, ranges: dict[str, FlatRange]) -> None:
    """Fill ranges from a checkpoint; each process plans its own reads, and nothing is sent.

    Args:
        folder: The checkpoint.
        index: Where its tensors lie.
        ranges: What to fill, by key `part/parameter name`.

    Raises:
        CheckpointError: a file cannot be read, or does not hold a range.
    """
    pieces: dict[int, list[_Piece]] = defaultdict(list)
    for key, part in ranges.items():
        for file, piece in _pieces(key, part, index):
            pieces[file].append(piece)
    buffer = np.empty(_READ_NUMEL, dtype="<f4")  # takes memory only as far as it is filled
    for file, in_file in sorted(pieces.items()):
        where = f"{folder.name}/{index.files[file]}"
        try:
            with open_regular(folder / index.files[file], follow_links=False) as opened:
                for piece in sorted(in_file, key=lambda piece: piece.offset):
                    _fill(opened.fileno(), piece, index.are_archives, buffer)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{where}: {error}") from error


def fill_ranges(folder: Path, index: RangeIndex, ranges: dict[str, FlatRange]) -> None:
    """Fill ranges of any form from a checkpoint, as `read_ranges` does.

    Blocks of 8 bits are made from fp32 values, of which a few million are held at a time. Values
    that blocks have held before are held exactly; others are rounded to the nearest.

    Raises:
        CheckpointError: see `read_ranges`.
    """
    read_ranges(folder, index, {k: part for k, part in ranges.items() if part.exponents is None})
    for key, part in ranges.items():
        blocks = part.blocks
        if blocks is None:
            continue
        for first in range(0, part.tensor.numel(), _READ_NUMEL):
            numel = min(_READ_NUMEL, part.tensor.numel() - first)
            values = torch.empty(numel)
            piece = FlatRange(
                tensor=values, offset=part.offset + first, global_numel=part.global_numel
            )
            read_ranges(folder, index, {key: piece})
            blocks.narrow(first, numel).fill(values)


class _Piece(NamedTuple):
    """Elements that one stored range gives to a range that is asked for."""

    offset: int
    """First byte of the stored range in its file."""
    length: int
    """Bytes of the stored range."""
    numel: int
    """Elements of the stored range."""
    skipped: int
    """Elements of the stored range that lie before those that are asked for."""
    target: torch.Tensor
    """Where the elements go; 1-D."""


def _pieces(key: str, part: FlatRange, index: RangeIndex) -> Iterator[tuple[int, _Piece]]:
    """Yield what fills a range, with the number of its file."""
    if key not in index.tensors:
        raise CheckpointError(f"tensor '{key}' is not in the checkpoint.")
    stored = index.tensors[key]
    numel = int(stored.starts[-1])
    whole = part.tensor.detach()  # a parameter is filled in place, too
    end = part.offset + whole.numel()
    if numel != part.global_numel or end > numel:
        raise CheckpointError(
            f"tensor '{key}': elements {part.offset} to {end} of {part.global_numel} are asked "
            f"for, the checkpoint holds {numel}."
        )
    number = int(np.searchsorted(stored.starts, part.offset, side="right")) - 1
    low = part.offset
    while low < end:
        first = int(stored.starts[number])
        high = min(end, int(stored.starts[number + 1]))
        piece = _Piece(
            offset=int(stored.offsets[number]),
            length=int(stored.lengths[number]),
            numel=int(stored.starts[number + 1]) - first,
            skipped=low - first,
            target=whole[low - part.offset : high - part.offset],
        )
        yield int(stored.files[number]), piece
        low = high
        number += 1


def _fill(descriptor: int, piece: _Piece, is_archive: bool, buffer: Floats) -> None:
    """Read the elements of one stored range, as many at a time as the buffer holds."""
    offset = piece.offset
    if is_archive:
        offset = values_offset(descriptor, piece.offset, piece.length, piece.numel)
    offset += piece.skipped * FP32_BYTES
    for target in piece.target.split(len(buffer)):
        values = buffer[: target.numel()]
        _read_exactly(descriptor, values.view(np.uint8).data, offset)
        target.copy_(torch.from_numpy(values))
        offset += values.nbytes


def _read_exactly(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"it ends at byte {offset + done}, before its values do.")
        done += count


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
    read_ranges(folder, read_range_index(folder, manifest), ranges)
    return tensors
