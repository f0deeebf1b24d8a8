"""Saving: all ranks write a checkpoint together.

    fresh `.tmp-step-*` folder -> each rank writes and hashes its ranges -> manifest -> rename
      -> prune

Decisions
    Everything that needs all ranks happens at a step boundary, in the main thread, over the control
    group. A background thread only writes and hashes its rank's own file, so it needs no collective
    and no group of its own.
    A save is published when all ranks have said, in the bookkeeping collective of a step, that
    their part is on disk. At most one save is in flight; a second one waits for the first to be
    published.
    Nothing random happens inside a step, so there is no random state to save.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.flat_planner import FlatRange
from cpt.checkpoint.loading import stored_ranges, tensor_records
from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.pruning import prune
from cpt.checkpoint.reader import refusal_of, step_folder
from cpt.checkpoint.staging import Staging, check_host_memory
from cpt.checkpoint.writer import Written, complete_folder, publish_folder, write_ranges, written_by
from cpt.config import CheckpointSection
from cpt.errors import InternalError
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.resilience.faults import fault_point
from cpt.storage.space import check_checkpoint_space, write_error
from data_pipeline.store.files import FOLDER_MODE, make_folder

log = logging.getLogger("cpt.checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A checkpoint that is complete and has its final name."""

    step: int
    """Optimizer steps done."""
    folder: Path
    """Folder of the checkpoint."""
    seconds: float
    """Time from the decision to save until the rename."""
    blocked_seconds: float
    """Part of this time in which training stood still."""
    asynchronous: bool
    """Whether it was written while training went on."""
    num_bytes: int
    """Size of the ranks' files; of a checkpoint that was there before, that of its tensors."""


class _Save:
    """One save in progress, and the outcome of this rank's part."""

    def __init__(self, step: int, state: dict[str, Any], final: Path) -> None:
        self.step = step
        self.final = final
        self.temporary = final.with_name(f".tmp-{final.name}")
        self.state = json.loads(json.dumps(state))  # a copy, because the run changes its own
        self.written: Written | None = None
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self.started = time.perf_counter()
        self.blocked_seconds = 0.0

    def write(self, ranges: dict[str, FlatRange], rank: int) -> None:
        """Write this rank's part; an error is kept for the next agreement of the ranks."""
        try:
            self.written = write_ranges(self.temporary, ranges, rank, self.step)
        except Exception as error:
            self.error = write_error(error, self.temporary)

    def result(self) -> Written:
        """Return what `write` has written.

        Raises:
            StorageError: writing failed.
        """
        if self.error is not None:
            raise self.error
        if self.written is None:
            raise InternalError(f"{self.temporary.name}: asked for a result before there is one.")
        return self.written


class Saver:
    """Saves the checkpoints of one run; every method is called by all ranks together."""

    def __init__(
        self, run_dir: Path, engine: Any, topology: Topology, settings: CheckpointSection
    ) -> None:
        """Prepare to save.

        Args:
            run_dir: The run directory.
            engine: The DeepSpeed engine whose state is saved.
            topology: The layout.
            settings: The `checkpoint` section of the run YAML.

        Raises:
            ConfigError: asynchronous saves are asked for, and a node has no memory for them.
        """
        self._run_dir = run_dir
        self._engine = engine
        self._topology = topology
        self._settings = settings
        self._staging = Staging()
        self._in_flight: _Save | None = None
        self._pruning: threading.Thread | None = None
        self._sound: set[int] = set()
        self._loaded: int | None = None
        self._kept: int | None = None
        self._written_here: set[str] | None = None
        if settings.async_save and settings.interval_steps:
            self._check_host_memory()

    def _check_host_memory(self) -> None:
        ranges = self._ranges()
        own = sum(part.tensor.nbytes for part in ranges.values())
        host = socket.gethostname()
        group = self._topology.control_group
        on_this_node = 0
        for other_host, size in gather_json((host, own), group):
            if other_host == host:
                on_this_node += size
        together(group, lambda: check_host_memory(own, on_this_node))

    def _ranges(self) -> dict[str, FlatRange]:
        """Return the ranges that this rank writes; those that several ranks hold are shared out."""
        ranges = stored_ranges(self._engine, self._topology)
        if self._written_here is None:  # the layout of a run does not change
            held = {key: (part.offset, part.tensor.numel()) for key, part in ranges.items()}
            self._written_here = written_by(
                self._topology.rank, gather_json(held, self._topology.control_group)
            )
        return {key: part for key, part in ranges.items() if key in self._written_here}

    def expected_bytes(self) -> int:
        """Return the size of the tensors of a checkpoint; no other rank is needed."""
        records = tensor_records(self._engine, self._topology)
        return sum(record.stored_bytes for record in records.values())

    def trust(self, step: int) -> None:
        """Note that a checkpoint was verified and loaded; it counts as sound, and this run does not
        prune it.
        """
        self._sound.add(step)
        self._loaded = step

    def keep(self, step: int) -> None:
        """Keep this checkpoint from deletion until another one is named here."""
        self._kept = step

    def save_now(self, step: int, state: dict[str, Any]) -> Published:
        """Publish one checkpoint before returning; a complete one of the same step is left alone.

        Args:
            step: Optimizer steps done.
            state: JSON values to restore besides the tensors.

        Raises:
            StorageError: a rank could not write; nothing was published and nothing older was
                touched.
        """
        save = self._begin(step, state)
        num_bytes = self.expected_bytes()
        if not self._is_complete(save):
            try:
                self._prepare(save)
                save.write(self._ranges(), self._topology.rank)
                num_bytes = self._publish(save)
            except Exception:
                self._remove(save)
                raise
        seconds = time.perf_counter() - save.started
        return Published(
            step=step,
            folder=save.final,
            seconds=seconds,
            blocked_seconds=seconds,
            asynchronous=False,
            num_bytes=num_bytes,
        )

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state of this step to host memory, and write it in the background.

        Args:
            step: Optimizer steps done.
            state: JSON values to restore besides the tensors.

        Raises:
            StorageError: this save cannot begin; nothing older was touched.
        """
        save = self._begin(step, state)
        if self._is_complete(save):
            return
        try:
            self._prepare(save)
            own = self._ranges()
            ranges = together(self._topology.control_group, lambda: self._staging.copy(own))
        except Exception:
            self._remove(save)
            raise
        save.thread = threading.Thread(
            target=save.write, args=(ranges, self._topology.rank), daemon=True
        )
        save.thread.start()
        save.blocked_seconds += time.perf_counter() - save.started
        self._in_flight = save

    def _begin(self, step: int, state: dict[str, Any]) -> _Save:
        if self._in_flight is not None:
            raise InternalError(
                f"step {step} is to be saved while step {self._in_flight.step} is still in flight."
            )
        return _Save(step, state, step_folder(self._run_dir, step))

    def own_part_is_settled(self) -> bool:
        """Return whether this rank's part of the save in flight is written or has failed."""
        if self._in_flight is None:
            return False
        thread = self._in_flight.thread
        return thread is None or not thread.is_alive()

    def publish_settled(self, settled_ranks: int) -> Published | None:
        """Publish the save in flight if every rank's part is settled.

        Args:
            settled_ranks: Number of ranks whose part is settled, the same on all ranks.

        Raises:
            StorageError: a rank's part failed; the save was removed.
        """
        if self._in_flight is None or settled_ranks < self._topology.world_size:
            return None
        return self._publish_in_flight(self._in_flight)

    def finish(self) -> Published | None:
        """Wait for the save in flight, if there is one, and publish it.

        Raises:
            StorageError: the save failed; nothing was published and nothing older was touched.
        """
        save = self._in_flight
        if save is None:
            return None
        settled = gather_json(self.own_part_is_settled(), self._topology.control_group)
        behind = [rank for rank, done in enumerate(settled) if not done]
        if behind:
            log.info(
                "waiting for the checkpoint of step %d, still being written by ranks %s",
                save.step,
                behind,
            )
        return self._publish_in_flight(save)

    def _publish_in_flight(self, save: _Save) -> Published:
        began = time.perf_counter()
        self._in_flight = None
        if save.thread is not None:
            save.thread.join()
        try:
            num_bytes = self._publish(save)
        except Exception:
            self._remove(save)
            raise
        now = time.perf_counter()
        return Published(
            step=save.step,
            folder=save.final,
            seconds=now - save.started,
            blocked_seconds=save.blocked_seconds + now - began,
            asynchronous=True,
            num_bytes=num_bytes,
        )

    def close(self) -> None:
        """Wait for deletions; no other rank is needed, so this may be called in any state."""
        if self._pruning is not None:
            self._pruning.join()

    def _is_complete(self, save: _Save) -> bool:
        return on_first_rank(
            self._topology.control_group, lambda: (save.final / MANIFEST).is_file()
        )

    def _prepare(self, save: _Save) -> None:
        self.close()
        fault_point("save_stage", save.step)
        world_size = self._topology.world_size

        def fresh_folder() -> None:
            parent = save.temporary.parent
            try:
                make_folder(parent)
                for stale in parent.glob(".tmp-step-*"):
                    shutil.rmtree(stale)
                needed = self.expected_bytes()
                check_checkpoint_space(parent, needed, largest_file_bytes=needed // world_size)
                save.temporary.mkdir(mode=FOLDER_MODE)
            except OSError as error:
                raise write_error(error, parent) from error

        on_first_rank(self._topology.control_group, fresh_folder)

    def _publish(self, save: _Save) -> int:
        """Give a save its final name, and return the bytes of the ranks' files."""
        group = self._topology.control_group
        own = together(group, save.result)
        parts = gather_json({"file": asdict(own.file), "ranges": own.ranges}, group)
        layout = {
            "world_size": self._topology.world_size,
            "sp_size": self._topology.sp_size,
            "ep_size": self._topology.ep_size,
            "zero_stage": self._engine.zero_optimization_stage(),
        }
        records = tensor_records(self._engine, self._topology)
        fault_point("save_manifest", save.step)
        on_first_rank(
            group,
            lambda: complete_folder(
                save.temporary,
                parts,
                step=save.step,
                layout=layout,
                tensors=records,
                state=save.state,
            ),
        )
        fault_point("save_rename", save.step)
        on_first_rank(group, lambda: publish_folder(save.temporary, save.final))
        fault_point("save_published", save.step)
        self._sound.add(save.step)
        if self._topology.rank == 0:
            self._pruning = threading.Thread(target=self._prune, args=(save.step,), daemon=True)
            self._pruning.start()
        return sum(part["file"]["bytes"] for part in parts)

    def _prune(self, newest: int) -> None:
        protected = {newest}
        for step in (self._loaded, self._kept):
            if step is not None:
                protected.add(step)
        prune(
            self._run_dir,
            newest=newest,
            keep_last=self._settings.keep_last,
            keep_every_steps=self._settings.keep_every_steps,
            protected=protected,
            is_sound=self._is_sound,
        )

    def _is_sound(self, step: int) -> bool:
        """Return whether a checkpoint is sound.

        Those that this run wrote or loaded are. Others are read once, in the background.
        """
        if step not in self._sound:
            reason = refusal_of(step_folder(self._run_dir, step))
            if reason is not None:
                log.warning("an older checkpoint is damaged and does not count as kept: %s", reason)
                return False
            self._sound.add(step)
        return True

    def _remove(self, save: _Save) -> None:
        """Remove a failed save, into which no rank writes any more."""
        if self._topology.rank == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
