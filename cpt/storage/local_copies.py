"""Copies of a run's input on a disk of the node, which its ranks read in place of shared storage.

    slurm/node.sh    once on each node: `cpt stage` makes the copies and prints where they are
    ranks            `local_copy(path)` is the copy, or the path itself where there is none

Decisions
    The configuration keeps the paths on shared storage and the places of the copies are in the
    environment: a run is the same run wherever a node reads from, and a node without room reads
    from shared storage. Builds and weights are known by their content, not by their paths.
    A copy gets its name when it is complete. The name holds a hash of path, names, sizes and times
    of the files it was made from, so that a source that has changed has no copy yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpt.errors import StorageError
from cpt.storage.space import check_space
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.files import make_folder
from data_pipeline.store.ownership import refuse_foreign

VARIABLE = "CPT_STAGED"
"""Environment variable: a JSON object from paths on shared storage to those of copies."""
SPACE_MARGIN = 1.02
"""Free space that a copy must find, as a multiple of its size."""
LONGEST_WAIT_SECONDS = 3600.0
"""How long a job waits for another one that copies to the same folder."""
COPIES_AT_ONCE = 8
"""Files that are copied at the same time: one stream does not fill a parallel file system."""
_PARTIAL = ".partial-"
_BLOBS = "blobs"


def local_copy(path: Path, variables: Mapping[str, str] = os.environ) -> Path:
    """Return this node's copy of a directory; the path itself if the node has none."""
    text = variables.get(VARIABLE, "")
    if not text:
        return path
    return Path(json.loads(text).get(str(path.resolve()), path))


@contextlib.contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Hold a directory of copies against other jobs of this node, and remove what they left half
    done.

    Raises:
        ConfigError: the directory is not this user's alone.
        StorageError: the directory cannot be made or written, or another job does not let go of it.
    """
    with contextlib.ExitStack() as held:
        try:
            make_folder(root, 0o700)
            refuse_foreign(root, "folder of copies")
            lock = file_lock(root / ".lock", limit_seconds=LONGEST_WAIT_SECONDS)
            held.enter_context(lock)
        except LockHeld as error:
            raise StorageError(
                f"{root}: {error}, for more than {LONGEST_WAIT_SECONDS:.0f} s. Set CPT_STAGE_DIR "
                "to another."
            ) from None
        except OSError as error:
            raise StorageError(
                f"{root}: {error.strerror}. Set CPT_STAGE_DIR to another."
            ) from error
        for leftover in root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def stage(source: Path, names: Iterable[str], root: Path) -> Path:
    """Copy files of a directory to a disk of this node, unless an equal copy is there.

    Symbolic links are kept as links to copies, because the cache of the Hugging Face Hub keeps the
    hash of a file in the name of what its link points to.

    Args:
        source: The directory on shared storage.
        names: Its files, relative to it.
        root: The directory of copies, which this process holds (`alone_in`).

    Returns:
        The copy.

    Raises:
        StorageError: there is too little room, or a file could not be read or written.
    """
    try:
        sizes = {}
        listing: list[str | int] = [str(source.resolve())]
        for name in sorted(names):
            found = (source / name).stat()
            sizes[name] = found.st_size
            listing += [name, found.st_size, found.st_mtime_ns]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
        copy = root / f"{source.name}-{digest}"
        if copy.exists():
            if _has_sizes(copy, sizes):
                return copy
            shutil.rmtree(copy)
        check_space(
            root,
            sum(sizes.values()),
            claim=f"the copy of {source} needs",
            margin=SPACE_MARGIN,
            cure="Set CPT_STAGE_DIR to a larger disk.",
        )
        _copy_whole(source, sizes, copy)
    except OSError as error:
        raise StorageError(
            f"{error.filename or source}: {error.strerror}, while copying."
        ) from error
    return copy


def _has_sizes(copy: Path, sizes: Mapping[str, int]) -> bool:
    """Return whether a copy still has all its files; node-local disks are cleaned by age."""
    for name, size in sizes.items():
        path = copy / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def _copy_whole(source: Path, sizes: Mapping[str, int], copy: Path) -> None:
    """Copy under a temporary name, compare the sizes, and rename."""
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=copy.parent))
    try:
        with ThreadPoolExecutor(COPIES_AT_ONCE) as threads:
            list(threads.map(lambda name: _copy_file(source / name, partial, name), sizes))
        if not _has_sizes(partial, sizes):
            raise StorageError(f"{source}: changed while it was copied to {copy.parent}.")
        partial.rename(copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_file(file: Path, folder: Path, name: str) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink():
        blob = folder / _BLOBS / file.resolve().name
        blob.parent.mkdir(exist_ok=True)
        target.symlink_to(os.path.relpath(blob, target.parent))
        target = blob
    shutil.copyfile(file, target)
