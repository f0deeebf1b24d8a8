"""The run directory before anything is loaded: made, written to, held against other jobs, and large
enough.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GptOssConfig

from cpt.checkpoint.reader import list_steps
from cpt.config import RunConfig
from cpt.errors import StorageError
from cpt.model.freezing import frozen_names
from cpt.model.parameters import parameter_numels
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.lock import LOCK, RunLock, take_lock
from cpt.storage.space import check_space, megabytes

log = logging.getLogger("cpt.job.run_dir")


@contextmanager
def held_run_dir(
    run_dir: Path, resume: str, config: RunConfig, model_config: GptOssConfig, topology: Topology
) -> Iterator[None]:
    """Make the run directory ready and keep other jobs out of it; rank 0 does this for all.

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
        check_run_space(run_dir, config, model_config)

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
                "%s is writable by everybody, and its checkpoints decide what is loaded; chmod o-w.",
                run_dir,
            )
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"run directory {run_dir}: {error.filename} is not a directory. Give another with --run_dir."
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
    kept = [
        entry
        for entry in run_dir.iterdir()
        if entry.name != LOCK and not entry.name.startswith("previous-")
    ]
    if not kept:
        return
    try:
        taken = [
            int(entry.name.removeprefix("previous-")) for entry in run_dir.glob("previous-[0-9]*")
        ]
        aside = run_dir / f"previous-{max(taken, default=0) + 1}"
        aside.mkdir()
        for entry in kept:
            shutil.move(str(entry), str(aside / entry.name))
    except OSError as error:
        raise StorageError(f"{run_dir} could not be cleared: {error.strerror}.") from error


def check_run_space(run_dir: Path, config: RunConfig, model_config: GptOssConfig) -> None:
    """Refuse a run whose first checkpoint does not fit; warn if all that are to be kept do not.

    Raises:
        StorageError: see `check_space`.
    """
    numels = parameter_numels(model_config)
    frozen = frozen_names(config.train.freeze, numels)
    size = sum(4 * numel * (1 if name in frozen else 3) for name, numel in numels.items())
    check_space(run_dir, size, largest_file_bytes=size // config.world_size)
    more = (
        config.checkpoint.keep_last + 1 - len(list_steps(run_dir))
    )  # one more while it is written
    free = shutil.disk_usage(run_dir).free
    if more * size > free:
        log.warning(
            "%s has %s free; keeping %d checkpoints of %s takes %s more.",
            *(
                run_dir,
                megabytes(free),
                config.checkpoint.keep_last,
                megabytes(size),
                megabytes(more * size),
            ),
        )
