"""Saving: all ranks write a checkpoint together.

    fresh `.tmp-step-*` folder -> each rank writes and hashes its ranges -> manifest -> rename
      -> prune

Decisions
    Everything that needs all ranks happens at a step boundary, in the main thread, over the control
    group. A background thread only copies, writes and hashes its rank's own files, and in the first
    rank the manifest, so it needs no collective and no group of its own.
    When all ranks have said, in the bookkeeping collective of a step, that their part is on disk,
    the first rank completes the folder; when it has said so in the collective of a later step, the
    checkpoint is published. At most one save is in flight; a second one waits for the first to be
    published.
    Training stands still for a few collectives, and in the next update for what is not yet copied
    or written by then (`StateReading`).
    Nothing random happens inside a step, so there is no random state to save.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.loading import stored_ranges, tensor_records
from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.own_part import OwnPart
from cpt.checkpoint.pruning import Retention
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.save_in_progress import Published, SaveInProgress
from cpt.checkpoint.staging import Way, agreed_way
from cpt.checkpoint.writer import complete_folder, publish_folder, written_by
from cpt.config import CheckpointSection
from cpt.errors import InternalError
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.resilience.faults import fault_point
from cpt.storage.space import check_checkpoint_space, write_error
from data_pipeline.store.files import FOLDER_MODE, make_folder

log = logging.getLogger("cpt.checkpoint")

Part = dict[str, Any]
"""`Written` of one file, as plain values."""


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
            ConfigError: copies of the state are asked for, and a node has no memory for them.
        """
        self._run_dir = run_dir
        self._engine = engine
        self._topology = topology
        self._settings = settings
        self._retention = Retention(run_dir, settings)
        self._own = OwnPart(topology.rank, settings.buffer_mib * 2**20, topology.device)
        self._in_flight: SaveInProgress | None = None
        self._written_here: set[str] | None = None
        self._linked_bytes = 0
        self.way: Way = "wait"
        """How periodic saves are made."""
        if settings.interval_steps:
            moving, _ = self._ranges()
            self.way = agreed_way(settings.async_save, moving, topology)

    def _ranges(self) -> tuple[dict[str, FlatRange], dict[str, FlatRange]]:
        """Return the ranges that this rank writes: those that updates change, and the frozen ones.

        Those that several ranks hold are shared out.
        """
        ranges = stored_ranges(self._engine, self._topology)
        if self._written_here is None:  # the layout of a run does not change
            held = {key: (part.offset, part.tensor.numel()) for key, part in ranges.items()}
            self._written_here = written_by(
                self._topology.rank, gather_json(held, self._topology.control_group)
            )
        records = tensor_records(self._engine, self._topology)
        moving: dict[str, FlatRange] = {}
        frozen: dict[str, FlatRange] = {}
        for key, part in ranges.items():
            if key in self._written_here:
                is_moving = records[key.split("/", 1)[1]].trained
                (moving if is_moving else frozen)[key] = part
        return moving, frozen

    def expected_bytes(self) -> int:
        """Return the size of the tensors of a checkpoint; no other rank is needed."""
        records = tensor_records(self._engine, self._topology)
        return sum(record.stored_bytes for record in records.values())

    def trust(self, step: int) -> None:
        """Note that a checkpoint was verified and loaded; it counts as sound, and this run does not
        prune it.
        """
        self._retention.trust(step)
        self._own.note_loaded(step_folder(self._run_dir, step))
        self._linked_bytes = 0

    @property
    def kept(self) -> int | None:
        """Step whose checkpoint is kept from deletion until another one is."""
        return self._retention.kept

    def keep(self, step: int) -> None:
        """Keep a published checkpoint from deletion until another one is kept."""
        self._retention.kept = step

    @property
    def step_in_flight(self) -> int | None:
        """Step of the save that goes on beside training, if there is one."""
        return None if self._in_flight is None else self._in_flight.step

    def save_now(
        self, step: int, state: dict[str, Any], *, keep: bool = False, in_haste: bool = False
    ) -> Published:
        """Publish one checkpoint before returning; a complete one of the same step is left alone.

        Args:
            step: Optimizer steps done.
            state: JSON values to restore besides the tensors.
            keep: Keep this checkpoint from deletion, once it is published, until another one is.
            in_haste: Do not wait until older checkpoints are read to find out which may be deleted.

        Raises:
            StorageError: a rank could not write; nothing was published and nothing older was
                touched.
        """
        save = self._begin(step, state, "wait", keep=keep)
        save.num_bytes = self.expected_bytes()
        with save.blocking():
            if not self._is_complete(save):
                with self._removed_on_failure(save):
                    self._prepare(save, in_haste=in_haste)
                    save.attempt(self._writing(save))
                    self._complete_now(save, self._gather_parts(save))
                    self._note_published(save)
        return self._outcome(save)

    def start(self, step: int, state: dict[str, Any], *, keep: bool = False) -> None:
        """Begin to write the state of this step beside training.

        The next update waits until the state was copied or written (`StateReading`).

        Args:
            step: Optimizer steps done.
            state: JSON values to restore besides the tensors.
            keep: As in `save_now`.

        Raises:
            StorageError: this save cannot begin; nothing older was touched.
        """
        save = self._begin(step, state, self.way, keep=keep)
        with save.blocking():
            if self._is_complete(save):
                return
            with self._removed_on_failure(save):
                self._prepare(save)
            writing = self._writing(save)
            self._engine.state_reading.begin()
            self._in_flight = save
            save.beside_training(writing)
            if save.thread is None:
                self._engine.state_reading.end()  # nobody will read it

    def _begin(self, step: int, state: dict[str, Any], way: Way, *, keep: bool) -> SaveInProgress:
        if self._in_flight is not None:
            raise InternalError(
                f"step {step} is to be saved while step {self._in_flight.step} is still in flight."
            )
        return SaveInProgress(step, state, step_folder(self._run_dir, step), way, keep=keep)

    def _writing(self, save: SaveInProgress) -> Callable[[], None]:
        """Return what writes this rank's part, for the state as it is when this is called."""
        moving, frozen = self._ranges()
        ready = self._own.ready()
        reading = self._engine.state_reading

        def write() -> None:
            try:
                save.written = self._own.write(
                    save.temporary,
                    moving,
                    frozen,
                    save.step,
                    save.way,
                    ready=ready,
                    when_read=reading.end,
                )
            finally:
                reading.end()

        return write

    def own_part_is_settled(self) -> bool:
        """Return whether what this rank does for the save in flight is done or has failed."""
        if self._in_flight is None:
            return False
        thread = self._in_flight.thread
        return thread is None or not thread.is_alive()

    def advance(self, settled_ranks: int) -> Published | None:
        """Go on with the save in flight if every rank has settled its part.

        Once all parts are written, the first rank completes the folder beside training. Once it has
        done so, the checkpoint is published.

        Args:
            settled_ranks: Number of ranks whose part is settled, the same on all ranks.

        Raises:
            StorageError: a rank's part failed; the save was removed.
        """
        save = self._in_flight
        if save is None or settled_ranks < self._topology.world_size:
            return None
        with self._removed_on_failure(save), save.blocking():
            if not save.is_publishing:
                self._complete_beside_training(save, self._gather_parts(save))
                return None
            together(self._topology.control_group, save.check)
            self._note_published(save)
        return self._outcome(save)

    def finish(self) -> Published | None:
        """Wait for the save in flight, if there is one, and publish it.

        Raises:
            StorageError: the save failed; nothing was published and nothing older was touched.
        """
        save = self._in_flight
        if save is None:
            return None
        with self._removed_on_failure(save), save.blocking():
            settled = gather_json(self.own_part_is_settled(), self._topology.control_group)
            behind = [rank for rank, done in enumerate(settled) if not done]
            if behind:
                log.info(
                    "waiting for the checkpoint of step %d, still being written by ranks %s",
                    save.step,
                    behind,
                )
            if save.thread is not None:
                save.thread.join()
            if save.is_publishing:
                together(self._topology.control_group, save.check)
            else:
                self._complete_now(save, self._gather_parts(save))
            self._note_published(save)
        return self._outcome(save)

    def _outcome(self, save: SaveInProgress) -> Published:
        """Return what is told of a published checkpoint."""
        return Published(
            step=save.step,
            folder=save.final,
            seconds=time.perf_counter() - save.started,
            blocked_seconds=save.blocked_seconds + save.update_wait_seconds,
            update_wait_seconds=save.update_wait_seconds,
            way=save.way,
            num_bytes=save.num_bytes,
            linked_bytes=save.linked_bytes,
        )

    def close(self) -> None:
        """Wait for deletions; no other rank is needed, so this may be called in any state."""
        self._retention.close()

    def close_in_haste(self, max_seconds: float) -> None:
        """Wait for deletions, for so long at most, and do not read older checkpoints for them."""
        self._retention.hurry(max_seconds)

    def _is_complete(self, save: SaveInProgress) -> bool:
        return on_first_rank(
            self._topology.control_group, lambda: (save.final / MANIFEST).is_file()
        )

    def _prepare(self, save: SaveInProgress, *, in_haste: bool = False) -> None:
        if in_haste:
            self._retention.hurry()
        else:
            self._retention.close()
        fault_point("save_stage", save.step)
        world_size = self._topology.world_size

        def fresh_folder() -> None:
            parent = save.temporary.parent
            try:
                make_folder(parent)
                for stale in parent.glob(".tmp-step-*"):
                    shutil.rmtree(stale)
                needed = self.expected_bytes() - self._linked_bytes
                check_checkpoint_space(parent, needed, largest_file_bytes=needed // world_size)
                save.temporary.mkdir(mode=FOLDER_MODE)
            except OSError as error:
                raise write_error(error, parent) from error

        on_first_rank(self._topology.control_group, fresh_folder)

    def _gather_parts(self, save: SaveInProgress) -> list[Part]:
        """Return the files of all ranks, and note what they took.

        Raises:
            StorageError: a rank could not write.
        """
        group = self._topology.control_group
        together(group, save.check)
        assert save.written is not None
        files = [written.to_json() for written in save.written]
        waited = 0.0 if save.way == "wait" else self._engine.state_reading.waited_seconds
        parts = []
        for files_of_rank, waited_by_rank in gather_json((files, waited), group):
            parts += files_of_rank
            save.update_wait_seconds = max(save.update_wait_seconds, waited_by_rank)
        save.num_bytes = sum(part["file"]["bytes"] for part in parts)
        save.linked_bytes = sum(part["file"]["bytes"] for part in parts if part["is_linked"])
        return parts

    def _completion(self, save: SaveInProgress, parts: list[Part]) -> Callable[[], None]:
        """Return what the first rank does to complete the folder."""
        layout = {
            "world_size": self._topology.world_size,
            "sp_size": self._topology.sp_size,
            "ep_size": self._topology.ep_size,
            "zero_stage": self._engine.zero_optimization_stage(),
        }
        records = tensor_records(self._engine, self._topology)
        return lambda: complete_folder(
            save.temporary,
            parts,
            step=save.step,
            layout=layout,
            tensors=records,
            state=save.state,
        )

    def _complete_beside_training(self, save: SaveInProgress, parts: list[Part]) -> None:
        """Let the first rank complete the folder and give it its name while training goes on."""
        complete = self._completion(save, parts)

        def publish() -> None:
            fault_point("save_manifest", save.step)
            complete()
            fault_point("save_rename", save.step)
            publish_folder(save.temporary, save.final)

        save.is_publishing = True
        save.thread = None
        if self._topology.rank == 0:
            save.beside_training(publish)

    def _complete_now(self, save: SaveInProgress, parts: list[Part]) -> None:
        """Complete the folder and give it its name while all ranks wait."""
        group = self._topology.control_group
        fault_point("save_manifest", save.step)
        on_first_rank(group, self._completion(save, parts))
        fault_point("save_rename", save.step)
        on_first_rank(group, lambda: publish_folder(save.temporary, save.final))

    def _note_published(self, save: SaveInProgress) -> None:
        """Note that the folder has its name, and delete what is no longer kept."""
        fault_point("save_published", save.step)
        self._in_flight = None
        self._own.note_published(save.final)
        self._linked_bytes = save.linked_bytes
        if save.keep:
            self._retention.kept = save.step
        if self._topology.rank == 0:
            self._retention.note_published(save.step)

    @contextmanager
    def _removed_on_failure(self, save: SaveInProgress) -> Iterator[None]:
        """Give a save up if the block fails, which it does on all ranks; none writes any more."""
        try:
            yield
        except Exception:
            self._in_flight = None
            if self._topology.rank == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise
