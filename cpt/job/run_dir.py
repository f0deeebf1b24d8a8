"""Make the run directory, hold it against other jobs, and check that checkpoints fit."""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.errors import StageFinished, StorageError
from cpt.guard.requirements import acts
from cpt.job.resume_order import order_of, orders_but, write_orders
from cpt.model.adapters.layout import adapter_shapes
from cpt.model.freezing import frozen_names
from cpt.model.linear_maps import is_for_muon
from cpt.model.parameters import parameter_numels
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.lock import LOCK, RunLock, take_lock
from cpt.storage.space import check_checkpoint_space, size_text
from cpt.storage.state_bytes import FP32_BYTES, STORED_BYTES
from data_pipeline.store.files import FILE_MODE, make_folder
from data_pipeline.store.ownership import RUN_FOLDERS, refuse_foreign

log = logging.getLogger("cpt.job.run_dir")

RUN_DIR_MODE = 0o700
EXPORT_BYTES = 2
"""Bytes of a parameter in an export, which is bf16."""


@contextmanager
def held_run_dir(
    run_dir: Path, resume: str, config: RunConfig, numels: Mapping[str, int], topology: Topology
) -> Iterator[None]:
    """Make the run directory ready and keep other jobs out of it; the first rank does this for all.

    A run that goes on in another stage keeps the directory: the next program of this process takes
    it over.

    Raises:
        StorageError: it cannot be written, or a checkpoint does not fit.
        ConfigError: another job is at work there.
    """
    locks: list[RunLock] = []

    def take() -> None:
        make_run_dir(run_dir)
        locks.append(take_lock(run_dir))
        if resume != "auto":
            done = orders_but(run_dir, resume)
            if resume == "never":
                move_aside(run_dir)
                done.append(order_of(resume))
            write_orders(run_dir, done)
        check_run_space(run_dir, config, numels)

    try:
        on_first_rank(topology.control_group, take)
        yield
    except StageFinished:
        for lock in locks:
            lock.hand_over()
        locks.clear()
        raise
    finally:
        for lock in locks:
            lock.release()


def make_run_dir(run_dir: Path) -> None:
    """Create the run directory, for its owner only, and try to write there.

    Raises:
        ConfigError: it is there and not this user's alone.
        StorageError: it cannot be created or written.
    """
    try:
        make_folder(run_dir, RUN_DIR_MODE)
        # another user may have made it since the gate has looked
        refuse_foreign(run_dir, "run directory", RUN_FOLDERS)
        probe = run_dir / f".write-probe-{secrets.token_hex(8)}"
        probe.touch(mode=FILE_MODE, exist_ok=False)
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"run directory {run_dir}: {error.filename} is not a directory. "
            "Give another with --run_dir."
        ) from error
    except OSError as error:
        raise StorageError(
            f"run directory {run_dir}: {error.strerror}. Give another with --run_dir."
        ) from error


def move_aside(run_dir: Path) -> None:
    """Keep what an earlier run left, under another name, instead of overwriting it.

    Raises:
        StorageError: it cannot be moved.
    """
    kept = []
    numbers = [0]
    for entry in run_dir.iterdir():
        if entry.name.startswith("previous-"):
            number = entry.name.removeprefix("previous-")
            numbers.append(int(number) if number.isdigit() else 0)
        elif not entry.name.startswith(LOCK):
            kept.append(entry)
    if not kept:
        return
    try:
        aside = run_dir / f"previous-{max(numbers) + 1}"
        aside.mkdir(mode=RUN_DIR_MODE)
        for entry in kept:
            shutil.move(str(entry), str(aside / entry.name))
    except OSError as error:
        raise StorageError(
            f"{run_dir} could not be cleared: {error.strerror}. Give another with --run_dir."
        ) from error


def check_place(run_dir: Path, config: RunConfig, numels: Mapping[str, int]) -> None:
    """Check a run directory that may not exist yet, without making it.

    Args:
        run_dir: The run directory.
        config: The run.
        numels: Elements of every parameter of the model.

    Raises:
        StorageError: it cannot be made or written, or a checkpoint does not fit.
    """
    existing = existing_folder(run_dir)
    probe(run_dir, existing)
    size = checkpoint_bytes(config, numels)
    check_checkpoint_space(existing, size, largest_file_bytes=size // config.world_size)


def existing_folder(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def probe(run_dir: Path, existing: Path) -> None:
    """Write an empty file where a run directory is or would be made, and remove it again.

    Raises:
        StorageError: that is not possible.
    """
    if not existing.is_dir():
        raise StorageError(
            f"run directory {run_dir}: {existing} is not a directory. Give another with --run_dir."
        )
    try:
        with tempfile.NamedTemporaryFile(prefix=".write-probe-", dir=existing):
            pass
    except OSError as error:
        raise StorageError(
            f"run directory {run_dir}: {existing}: {error.strerror}. Give another with --run_dir."
        ) from error


def stored_numels(config: RunConfig, model_config: GptOssConfig) -> Mapping[str, int]:
    """Return the number of elements of every parameter that a checkpoint holds: those of the
    adapter, or of the model without one.
    """
    if not config.adapter.is_on:
        return parameter_numels(model_config)
    shapes = adapter_shapes(config.adapter, model_config)
    return {name: math.prod(shape) for name, shape in shapes.items()}


def checkpoint_bytes(config: RunConfig, numels: Mapping[str, int]) -> int:
    """Return the size of a checkpoint: 4 bytes per frozen parameter, 12 per trained one, 8 if it is
    one of Muon's.
    """
    frozen = frozen_names(config.train.freeze, numels)
    uses_muon = config.train.optimizer == "muon"
    size = 0
    for name, numel in numels.items():
        if name in frozen:
            size += numel * FP32_BYTES
        elif uses_muon and is_for_muon(name):
            size += numel * 2 * FP32_BYTES
        else:
            size += numel * STORED_BYTES
    return size


def check_run_space(run_dir: Path, config: RunConfig, numels: Mapping[str, int]) -> None:
    """Refuse a run whose first checkpoint does not fit.

    Raises:
        StorageError: see `check_checkpoint_space`.
    """
    size = checkpoint_bytes(config, numels)
    check_checkpoint_space(run_dir, size, largest_file_bytes=size // config.world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomNeeded:
    """The space that checkpoints and exports of a run take at one time, beyond what is there."""

    num_checkpoints: int
    """Checkpoints that are still to be written and lie there at the same time."""
    checkpoint_bytes: int
    """Size of each."""
    num_for_good: int
    """Those among them that are never deleted (`checkpoint.keep_every_steps`)."""
    export_bytes: int
    """Size of the export at the end; 0 without one."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.num_checkpoints * self.checkpoint_bytes + self.export_bytes

    def describe(self, free_bytes: int) -> str:
        """Return what is needed and what is free, in one line."""
        text = f"{self.num_checkpoints} x {size_text(self.checkpoint_bytes)}"
        if self.num_for_good:
            text += f" ({self.num_for_good} kept for good)"
        if self.export_bytes:
            text += f" + export {size_text(self.export_bytes)}"
        return f"{text}; {size_text(free_bytes)} free"

    def warn_if_tight(self, run_dir: Path, keep_last: int) -> None:
        """Warn of a run that has room for its first checkpoint but not for all that it keeps."""
        folder = existing_folder(run_dir)
        free = shutil.disk_usage(folder).free
        if free < self.total_bytes:
            log.warning(
                "%s has %s free, but the checkpoints of this run and its export take %s at one "
                "time (checkpoint.keep_last %d, and one that is being written): later saves will "
                "fail. Free some space, or keep less.",
                folder,
                size_text(free),
                size_text(self.total_bytes),
                keep_last,
            )


def room_needed(
    config: RunConfig, numels: Mapping[str, int], step: int, existing: Collection[int]
) -> RoomNeeded:
    """Return the space that a run needs from a step on.

    Args:
        config: The run.
        numels: Elements of every parameter of the model.
        step: Optimizer steps done.
        existing: Steps whose checkpoints are there already.
    """
    kept = config.checkpoint
    train = config.train
    last = train.total_steps if train.stop_at_step is None else train.stop_at_step
    saves = {max(step, last)}
    interval = kept.interval_steps
    if interval:
        saves.update(range(step - step % interval + interval, last, interval))
    every = sorted({*existing, *saves})
    for_good: set[int] = set()
    if kept.keep_every_steps:
        for_good = {saved for saved in every if saved % kept.keep_every_steps == 0}
    # one more than is kept exists while a checkpoint is written
    newest = set(every[-(kept.keep_last + 1) :])
    # the one that this start comes from is never deleted by it
    there = newest | for_good | ({step} & set(existing))
    # nor is the one that the guard goes back to, which may be older than the newest
    num_green = int(config.guard.enabled and acts(config.guard) and len(every) > len(there))
    export = 0
    if config.telemetry.export_at_end:
        export = EXPORT_BYTES * sum(numels.values())
    return RoomNeeded(
        num_checkpoints=max(1, len(there) + num_green - len(existing)),
        checkpoint_bytes=checkpoint_bytes(config, numels),
        num_for_good=len(for_good - newest - set(existing)),
        export_bytes=export,
    )
