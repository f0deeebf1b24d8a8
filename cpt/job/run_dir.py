"""Make the run directory, hold it against other jobs, and check that checkpoints fit."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cpt.checkpoint.reader import list_steps
from cpt.config import RunConfig
from cpt.errors import StorageError
from cpt.model.freezing import frozen_names
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.lock import LOCK, RunLock, take_lock
from cpt.storage.space import check_checkpoint_space, megabytes
from cpt.storage.state_bytes import FP32_BYTES, OPTIMIZER_BYTES

log = logging.getLogger("cpt.job.run_dir")


@contextmanager
def held_run_dir(
    run_dir: Path, resume: str, config: RunConfig, numels: Mapping[str, int], topology: Topology
) -> Iterator[None]:
    """Make the run directory ready and keep other jobs out of it; the first rank does this for all.

    Raises:
        StorageError: it cannot be written, or a checkpoint does not fit.
        ConfigError: another job is at work there.
    """
    locks: list[RunLock] = []

    def take() -> None:
        make_run_dir(run_dir)
        locks.append(take_lock(run_dir))
        if resume == "never":
            move_aside(run_dir)
        check_run_space(run_dir, config, numels)

    try:
        on_first_rank(topology.control_group, take)
        yield
    finally:
        for lock in locks:
            lock.release()


def make_run_dir(run_dir: Path) -> None:
    """Create the run directory, for its owner only, and try to write there.

    Raises:
        StorageError: it cannot be created or written.
    """
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(exist_ok=True, mode=0o700)
        probe = run_dir / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        if run_dir.stat().st_mode & stat.S_IWOTH:
            log.warning(
                "%s is writable by everybody, but a run loads what lies there; chmod o-w.",
                run_dir,
            )
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
        elif entry.name != LOCK:
            kept.append(entry)
    if not kept:
        return
    try:
        aside = run_dir / f"previous-{max(numbers) + 1}"
        aside.mkdir()
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
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise StorageError(
            f"run directory {run_dir}: {existing} is not a directory. Give another with --run_dir."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(
            f"run directory {run_dir}: {existing}: {why_unwritable(existing)}. "
            "Give another with --run_dir."
        )
    size = checkpoint_bytes(config, numels)
    check_checkpoint_space(existing, size, largest_file_bytes=size // config.world_size)


def why_unwritable(folder: Path) -> str:
    """Return why this process may not write in a folder."""
    is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if is_read_only else errno.EACCES)


def checkpoint_bytes(config: RunConfig, numels: Mapping[str, int]) -> int:
    """Return the size of a checkpoint: 4 bytes per frozen parameter, 12 per trained one."""
    frozen = frozen_names(config.train.freeze, numels)
    size = 0
    for name, numel in numels.items():
        size += numel * (FP32_BYTES if name in frozen else OPTIMIZER_BYTES)
    return size


def check_run_space(run_dir: Path, config: RunConfig, numels: Mapping[str, int]) -> None:
    """Refuse a run whose first checkpoint does not fit; warn if all that are kept will not.

    Raises:
        StorageError: see `check_checkpoint_space`.
    """
    size = checkpoint_bytes(config, numels)
    check_checkpoint_space(run_dir, size, largest_file_bytes=size // config.world_size)
    # one more than is kept exists while a checkpoint is written
    missing = config.checkpoint.keep_last + 1 - len(list_steps(run_dir))
    free = shutil.disk_usage(run_dir).free
    if missing * size > free:
        log.warning(
            "%s has %s free; keeping %d checkpoints of %s takes %s more.",
            run_dir,
            megabytes(free),
            config.checkpoint.keep_last,
            megabytes(size),
            megabytes(missing * size),
        )
