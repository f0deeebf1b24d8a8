"""manifest.json: what makes a directory a checkpoint, and the proof that its files are the ones that were written.

A directory is complete if and only if its manifest is there, matches its own checksum, and every listed file matches
in size and hash with no unknown file beside it.  The manifest is written last and deleted first.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from cpt.errors import CheckpointError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint that is not in its tensors."""

    step: int
    """Optimizer steps done."""
    files: tuple[FileRecord, ...]
    """Every file but the manifest."""
    tensors: dict[str, TensorRecord]
    """Parameter name -> record; each is stored as master and, if it was trained, exp_avg and exp_avg_sq."""
    layout: dict[str, int]
    """world_size, sp_size, ep_size, zero_stage of the run that wrote it."""
    versions: dict[str, str]
    """Versions of what wrote it."""
    state: dict[str, Any]
    """Tokens seen, data position, configuration; JSON values only."""


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(8 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file that was just written."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, xxh3_128=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json; the directory counts from the rename that follows."""
    body = {"format": FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against itself; the files are not looked at.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {_LARGEST_MANIFEST_BYTES} bytes; not one of ours.")
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        if body["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {body['format']}, this version reads {FORMAT_VERSION}.")
        if _checksum(body) != checksum:
            raise CheckpointError(f"{path}: its checksum does not match its content.")
        del body["format"]
        files = tuple(FileRecord(**record) for record in body.pop("files"))
        records = body.pop("tensors").items()
        tensors = {name: TensorRecord(**{**record, "shape": tuple(record["shape"])}) for name, record in records}
        return Manifest(files=files, tensors=tensors, **body)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so the directory is not a complete checkpoint.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file that is missing, unknown, not a regular file, or differs in size or hash.
    """
    listed = {record.name: record for record in manifest.files}
    present = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    if unknown := sorted(present - listed.keys()):
        raise CheckpointError(f"{folder.name}/{unknown[0]}: not in the manifest.")
    for name, record in sorted(listed.items()):
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{folder.name}: the manifest names '{name}', which is not a plain file name.")
        path = folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise CheckpointError(f"{folder.name}/{name}: missing, though the manifest lists it.") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{folder.name}/{name}: not a regular file.")
        if status.st_size != record.bytes:
            raise CheckpointError(f"{folder.name}/{name}: {status.st_size} bytes, manifest says {record.bytes}.")
        if hash_file(path) != record.xxh3_128:
            raise CheckpointError(f"{folder.name}/{name}: its content does not match the manifest's hash.")
