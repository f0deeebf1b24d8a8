"""Files that are either complete or absent, and the hashes that prove what a file holds.

Decisions
    Everything in this repository that replaces a file does it here: the bytes go to a temporary
    name in the same folder, are synced, and are renamed; then the folder is synced, because a
    rename survives a power cut only once its folder is on disk, too.
    What is made here can be written to by its owner alone, whatever the umask: `FILE_MODE` and
    `FOLDER_MODE` are asked for explicitly, and a umask can only take more away.
    A link in the place of a file is never followed: whoever can make a link there could let us
    write to, or read, another file of the user.
    sha256 is for files that others check with their own tools; xxh3_128 is some ten times faster
    and is for large files that nobody would forge.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import xxhash

from data_pipeline.bounded.files import LINK_REASON, open_regular

PARTIAL_SUFFIX = ".partial"
FILE_MODE = 0o644
FOLDER_MODE = 0o755
_CHUNK_BYTES = 4 * 2**20
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"(?<!\d)\d+ requested and \d+ written")
"""What NumPy says when a file takes less than an array has, which it does without a number."""

P = ParamSpec("P")
T = TypeVar("T")


class AtomicFile:
    """A file that is written under a temporary name until `publish` gives it its own.

    For writers that stay open across many calls; anything shorter uses `atomic_write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # The random part keeps two processes that write the same file from mixing their bytes.
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        self.file: BinaryIO = open(self._temporary, "xb", opener=no_links)  # noqa: SIM115

    def publish(self) -> None:
        """Sync the content, and let the file appear under its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._temporary.rename(self._path)
        sync_directory(self._path.parent)

    def discard(self) -> None:
        """Close the temporary file and remove it; does nothing after `publish`."""
        try:
            self.file.close()
        finally:
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that appears as `path` once the block has ended without an error."""
    atomic = AtomicFile(path)
    try:
        yield atomic.file
        atomic.publish()
    except OSError as error:
        raise _with_path(error, path) from error
    finally:
        atomic.discard()


def _with_path(error: OSError, path: Path) -> OSError:
    """Return an error of writing a file that names the file: write and fsync know only a number."""
    if error.filename is None:
        if error.errno in _OF_WRITING:
            return OSError(error.errno, error.strerror, str(path))
        if error.errno is None and _SHORT_WRITE.search(str(error)):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(
    path: Path, value: Any, *, indent: int | None = None, sort_keys: bool = False
) -> None:
    """Write a JSON file atomically: ASCII, and a newline at the end."""
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def no_links(path: str | Path, flags: int, mode: int = FILE_MODE) -> int:
    """Open a file as `open(..., opener=no_links)` does, unless its name is that of a link.

    Links among the folders above it are followed.

    Args:
        path: The file.
        flags: As for `os.open`.
        mode: Permissions of a file that is made; the umask narrows them.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        raise OSError(errno.ELOOP, LINK_REASON, str(path)) from error


def make_folder(path: Path, mode: int = FOLDER_MODE) -> None:
    """Make a folder and those above it, unless it is there; only their owner can write to them.

    Args:
        path: The folder.
        mode: Permissions of the folder itself; the umask narrows them.

    Raises:
        OSError: it cannot be made, or something else has its name.
    """
    try:
        path.mkdir(mode=mode)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_folder(path.parent)
        make_folder(path, mode)
    except OSError:
        # a file system may say EROFS or EACCES of what is there
        if not path.is_dir():
            raise


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


AtChunk = Callable[[], object]
"""Called for each chunk of a file that is hashed; what it raises ends the reading."""


def no_call() -> None:
    """Do nothing at a chunk."""


def xxh3_of(path: Path, at_chunk: AtChunk = no_call) -> str:
    """Return the hex xxh3_128 of a regular file."""
    with open_regular(path) as file:
        return xxh3_of_open(file, at_chunk)


def xxh3_of_open(file: IO[bytes], at_chunk: AtChunk = no_call) -> str:
    """Return the hex xxh3_128 of what is left to read in an open file.

    Args:
        file: The file.
        at_chunk: See `AtChunk`.
    """
    digest = xxhash.xxh3_128()
    while chunk := file.read(_CHUNK_BYTES):
        at_chunk()
        digest.update(chunk)
    return digest.hexdigest()


def cached_per_file(
    max_files: int,
) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """Make a decorator that remembers what a function of a file returned, in this process.

    The file is read again once its size, one of its times or its inode is another. Further
    arguments must be hashable.

    Args:
        max_files: How many results are kept.
    """

    def decorate(read: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        @functools.lru_cache(maxsize=max_files)
        def read_version(
            version: tuple[int, int, int, int], path: Path, *args: P.args, **kwargs: P.kwargs
        ) -> T:
            return read(path, *args, **kwargs)

        @functools.wraps(read)
        def read_cached(path: Path, *args: P.args, **kwargs: P.kwargs) -> T:
            status = path.stat()
            version = (
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,  # nobody can set it
                status.st_ino,
            )
            return read_version(version, path, *args, **kwargs)  # type: ignore[arg-type]  # hashable

        return read_cached

    return decorate
