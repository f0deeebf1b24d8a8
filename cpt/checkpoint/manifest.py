"""manifest.json: what makes a directory a checkpoint, and the proof that its files are the ones
that were written.

A directory is complete if and only if its manifest is there, matches its own checksum, and every
listed file matches in size and hash with no unknown file beside it.  The manifest is written last
and deleted first.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from cpt.errors import CheckpointError
from data_pipeline.store.files import write_text, xxh3_of_open

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_LARGEST_MANIFEST_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Name inside the directory; no folders."""
    bytes: int
    """Size."""
    xxh3_128: str
    """Hash of the content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """One global tensor of a checkpoint, stored flat."""

    shape: tuple[int, ...]
    """Shape of the whole tensor, in Hugging Face's terms."""
    dtype: str
    """Stored dtype."""
    trained: bool = True
    """Whether Adam's moments are stored; of a frozen parameter there are none."""

    @property
    def stored_bytes(self) -> int:
        """Size of all that is stored of it, in fp32."""
        return 4 * math.prod(self.shape) * (3 if self.trained else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint that is not in its tensors."""

    step: int
    """Optimizer steps done."""
    files: tuple[FileRecord, ...]
    """Every file but the manifest."""
    tensors: dict[str, TensorRecord]
    """Parameter name -> record; each is stored as master and, if it was trained, exp_avg and
    exp_avg_sq.
    """
    layout: dict[str, int]
    """world_size, sp_size, ep_size, zero_stage of the run that wrote it."""
    versions: dict[str, str]
    """Versions of what wrote it."""
    state: dict[str, Any]
    """Tokens seen, data position, configuration; JSON values only."""


def _open_regular(path: Path) -> BinaryIO:
    """Open for reading, but neither through a symbolic link nor something that would block or has
    side effects.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content."""
    with _open_regular(path) as file:
        return xxh3_of_open(file)


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file that was just written."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, xxh3_128=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json; the directory counts from the rename that follows."""
    body = {"format": FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
    write_text(folder / MANIFEST, text)


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against itself; the files are not looked at.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        return _parse(path, _read_small_file(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, so the directory is not a complete checkpoint."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from error


def _read_small_file(path: Path) -> bytes:
    with _open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_MANIFEST_BYTES:
            raise CheckpointError(
                f"{path}: larger than {_LARGEST_MANIFEST_BYTES} bytes; not one of ours."
            )
        return file.read()


def _parse(path: Path, content: bytes) -> Manifest:
    body = json.loads(content.decode("utf-8"))  # the interpreter's recursion limit bounds the depth
    checksum = body.pop("checksum")
    if body["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {body['format']}, this version reads {FORMAT_VERSION}."
        )
    if _checksum(body) != checksum:
        raise CheckpointError(f"{path}: its checksum does not match its content.")
    del body["format"]
    manifest = Manifest(
        files=tuple(FileRecord(**record) for record in body.pop("files")),
        tensors={
            name: TensorRecord(**{**record, "shape": tuple(record["shape"])})
            for name, record in body.pop("tensors").items()
        },
        **body,
    )
    _check_types(manifest)
    for name in [record.name for record in manifest.files]:
        if Path(name).name != name or name in (".", "..", MANIFEST) or "\0" in name:
            raise CheckpointError(
                f"{path.parent.name}: the manifest names {name!r}, which is not a plain file name."
            )
    return manifest


def _check_types(manifest: Manifest) -> None:
    """A valid checksum does not make a valid manifest: its author may be somebody else."""
    counts = [
        manifest.step,
        *(record.bytes for record in manifest.files),
        *manifest.layout.values(),
    ]
    counts += [size for record in manifest.tensors.values() for size in record.shape]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("a step, size, shape or layout is no whole number")
    texts = [text for record in manifest.files for text in (record.name, record.xxh3_128)]
    texts += [*manifest.versions.values(), *(record.dtype for record in manifest.tensors.values())]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name, hash, version or dtype is no text")
    if not all(type(record.trained) is bool for record in manifest.tensors.values()):
        raise ValueError("trained is neither true nor false")
    if not isinstance(manifest.state, dict):
        raise ValueError("state is no mapping")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file that is missing, unknown, not a regular file, or differs in size or
            hash.
    """
    check_listing(folder, manifest)
    check_hashes(folder, manifest.files)


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Compare names, kinds and sizes of all files with the manifest; nothing is opened.

    Raises:
        CheckpointError: a file that is missing, unknown, not a regular file, or of another size.
    """
    listed = {record.name: record for record in manifest.files}
    present = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    if unknown := sorted(present - listed.keys()):
        raise CheckpointError(f"{folder.name}/{unknown[0]}: not in the manifest.")
    for name, record in sorted(listed.items()):
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder.name}/{name}: missing, though the manifest lists it."
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{folder.name}/{name}: not a regular file.")
        if status.st_size != record.bytes:
            raise CheckpointError(
                f"{folder.name}/{name}: {status.st_size} bytes, manifest says {record.bytes}."
            )


def check_hashes(folder: Path, files: Iterable[FileRecord]) -> None:
    """Compare the content of some files with their records.

    Raises:
        CheckpointError: the first that differs, or that cannot be read.
    """
    for record in sorted(files, key=lambda record: record.name):
        try:
            differs = hash_file(folder / record.name) != record.xxh3_128
        except OSError as error:
            raise CheckpointError(
                f"{folder.name}/{record.name}: cannot be read ({error.strerror})."
            ) from error
        if differs:
            raise CheckpointError(
                f"{folder.name}/{record.name}: its content does not match the manifest's hash."
            )


def share_of_files(files: Sequence[FileRecord], rank: int, world_size: int) -> list[FileRecord]:
    """The files that one rank hashes, so that all have about equally many bytes whatever layout
    wrote them.
    """
    loads = [0] * world_size
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    for record in sorted(files, key=lambda record: (-record.bytes, record.name)):
        least = loads.index(min(loads))
        loads[least] += record.bytes
        shares[least].append(record)
    return shares[rank]


def ownership_warnings(folder: Path) -> list[str]:
    """What is odd about who may change a checkpoint: its hashes find damage, not an author."""
    found = []
    for path in (folder, *sorted(folder.iterdir())):
        status = path.lstat()
        name = path.relative_to(folder.parent)
        if status.st_uid not in (os.getuid(), 0):
            found.append(f"{name} belongs to user {status.st_uid}, not to you ({os.getuid()}).")
        if status.st_mode & stat.S_IWOTH:
            found.append(f"{name} is writable by everybody; chmod o-w.")
    return found
