"""This rank's part of a checkpoint: its files, written by one thread without any other rank.

    __R_0.distcp   what an update changes: master weights and moments
    __R_1.distcp   frozen parameters, if this rank writes any

Decisions
    Frozen parameters are written once by a start. Later checkpoints link to the same file
    (link(2)), so each folder is whole by itself: pruning one leaves the others as they are, and a
    copy of one has all files. The first save of a start that came from a checkpoint hashes what it
    would write, and links if the checkpoint has just that.
    A file system without hard links gets the file again.
    What is linked shares its bytes on disk. If they decay, every checkpoint that links to them is
    rejected.
    A rank that gets no memory for a copy of its state writes the state as it lies, in this save and
    in later ones. Only its next update waits longer, so no other rank need know.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.staging import Staging, Way
from cpt.checkpoint.write_buffer import WriteBuffer
from cpt.checkpoint.writer import Written, shard_name, would_write, write_ranges, write_shard
from cpt.errors import CheckpointError
from cpt.resilience.faults import fault_point
from cpt.storage.allocation import release_page_locked

log = logging.getLogger("cpt.checkpoint")

Ranges = dict[str, FlatRange]


class OwnPart:
    """Writes this rank's files of the checkpoints of one run."""

    def __init__(self, rank: int, buffer_bytes: int, device: torch.device) -> None:
        """Prepare to write.

        Args:
            rank: This rank.
            buffer_bytes: Host memory through which values pass that are not written as they lie.
            device: The device that trains.
        """
        self._rank = rank
        self._buffer = WriteBuffer(buffer_bytes)
        self._staging: Staging | None = Staging()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loaded: Path | None = None
        self._published: tuple[Path, Written] | None = None
        self._written_frozen: Written | None = None

    def ready(self) -> torch.cuda.Event | None:
        """Return the moment until which the device has to come before the state may be read."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def write(
        self,
        folder: Path,
        moving: Ranges,
        frozen: Ranges,
        step: int,
        way: Way,
        *,
        ready: torch.cuda.Event | None,
        when_read: Callable[[], None],
    ) -> list[Written]:
        """Write this rank's files.

        Args:
            folder: The folder of the checkpoint.
            moving: What an update changes.
            frozen: What it does not change.
            step: Optimizer steps done.
            way: Whether `moving` is copied first, if there is memory for that.
            ready: See `ready`.
            when_read: Called once an update may change `moving`.
        """
        self._written_frozen = None
        with self._beside_training(ready):
            if way == "copy":
                fault_point("save_copy", step)
                copied = self._copied(moving)
                if copied is not None:
                    moving = copied
                    when_read()
            rank = self._rank
            buffer = self._buffer
            written = [write_ranges(folder, moving, rank, step, buffer=buffer, when_read=when_read)]
            if frozen:
                self._written_frozen = self._frozen_part(folder, frozen)
                written.append(self._written_frozen)
        return written

    def _copied(self, ranges: Ranges) -> Ranges | None:
        """Return a copy in host memory; None, now and ever after, if there is no memory for it."""
        if self._staging is None:
            return None
        try:
            return self._staging.copy(ranges)
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
            self._staging = None
            log.warning(
                "rank %d has no host memory for a copy of its state, and writes it as it lies from "
                "now on: the next update waits until it is written (%s)",
                self._rank,
                f"{type(error).__name__}: {error}".splitlines()[0],
            )
        release_page_locked()  # buffers made before the one that failed; the error held them
        return None

    @contextmanager
    def _beside_training(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """Let copies from the device run beside its work, once it has come to `ready`."""
        if self._stream is None:
            yield
            return
        # A thread begins on the first device, and leaving the block would go back there: this rank
        # would keep some hundred MB of a GPU that is another rank's.
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            yield

    def _frozen_part(self, folder: Path, frozen: Ranges) -> Written:
        name = shard_name(self._rank, frozen=True)
        known = self._published or self._same_in_loaded(name, frozen)
        if known is not None:
            source, written = known
            if _linked(source / name, folder / name):
                return replace(written, is_linked=True)
        return write_shard(folder / name, frozen, self._buffer)

    def _same_in_loaded(self, name: str, frozen: Ranges) -> tuple[Path, Written] | None:
        """Return the checkpoint that was loaded, if it has the file that would be written."""
        if self._loaded is None:
            return None
        try:
            files = read_manifest(self._loaded).files
        except CheckpointError:
            return None
        record = next((file for file in files if file.name == name), None)
        if record is None:
            return None
        written = would_write(name, frozen, self._buffer)
        return (self._loaded, written) if written.file == record else None

    def note_published(self, folder: Path) -> None:
        """Note that the checkpoint that was written last is complete."""
        if self._written_frozen is not None:
            self._published = (folder, self._written_frozen)

    def note_loaded(self, folder: Path) -> None:
        """Note that the state now is that of a checkpoint, whose files were verified."""
        self._loaded = folder
        self._published = None


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name; return False where that cannot be done."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links here, too many of one file, or the source is gone
        return False
    return True
