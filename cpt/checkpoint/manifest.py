"""The manifest: the file that makes a directory a checkpoint and proves that its files are intact.

A directory is complete if and only if its manifest.json is there, matches its own checksum, and
every listed file matches in size and hash, with no unknown file beside it. The manifest is written
last and deleted first.

This module imports no torch, because job scripts ask for the state of a run without it.

The room divides the work as follows:
    manifest.py       the manifest; hashes and sizes of files
    range_index.py    `ranges.json`: where the tensors lie
    metadata.py       `.metadata`: the same for the tools of torch.distributed.checkpoint (DCP)
    old_metadata.py, inert_pickle.py   the `.metadata` of checkpoints of format 1, read as data
    archives.py       the form of what DCP stores, and where the values lie in it
    flat_range.py     flat ranges of tensors
    write_buffer.py   values on their way into a file: in pieces, hashed
    writer.py         writes the files of a checkpoint's folder and publishes it
    staging.py        copies of the state, and whether there is room for them
    own_part.py       one rank's files; frozen parameters are linked
    save_in_progress.py   one save while it goes on
    saver.py          saves a run, together with all ranks
    reader.py         finds and reads sound checkpoints, without an engine
    loading.py        restores an engine from a checkpoint, together with all ranks
    weights.py        the weights of a checkpoint in pieces, for export
    adapter_state.py  of a checkpoint that holds an adapter: which one, and on which base
    model_weights.py  the weights of a checkpoint's model, with the adapter added if it holds one
    listing.py, pruning.py, status.py   what there is, what is deleted, whether a run is finished
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from cpt.errors import CheckpointError
from cpt.parallel.division import divide_among_all
from cpt.storage.state_bytes import FP32_BYTES, MOMENTS
from data_pipeline.bounded.files import open_regular
from data_pipeline.bounded.json_text import parse_json
from data_pipeline.console.progress import show_progress
from data_pipeline.escaping import escaped_line
from data_pipeline.store.files import AtChunk, no_call, write_text, xxh3_of_open

MANIFEST = "manifest.json"
RANGES = "ranges.json"
METADATA = ".metadata"
FORMAT_VERSION = 2
"""From 2 on, `ranges.json` says where the tensors lie; before, only `.metadata` did."""
READABLE_FORMATS = (1, 2)
PARTS = ("master", *MOMENTS)
"""Tensors that are stored of a parameter that AdamW trains: fp32 weights and two moments. Of a
frozen parameter only the first is stored.
"""
_LARGEST_MANIFEST_BYTES = 64 * 2**20
_MOST_VALUES = 2**22
_LARGEST_RANK = 8
_LONGEST_NAME = 512
_BYTES_PER_FOLDER = 2**20
_BYTES_PER_TENSOR = 2**12
_BYTES_PER_RANGE = 2**13
"""More than a checkpoint takes besides the values: an archive of a range takes 1.5 kB around them,
and its place in `ranges.json` and `.metadata` a few hundred bytes.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Name inside the directory; no folders."""
    bytes: int
    """Size in bytes."""
    xxh3_128: str
    """Hash of the content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """One global tensor of a checkpoint, stored flat."""

    shape: tuple[int, ...]
    """Shape of the whole tensor, as in the Hugging Face model."""
    dtype: str
    """Dtype in which the tensor is stored."""
    trained: bool = True
    """Whether moments are stored; a frozen parameter has none."""
    moments: tuple[str, ...] = MOMENTS
    """The moments that are stored if it is trained; an optimizer may need fewer than Adam's two."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `PARTS` that are stored of it."""
        return (PARTS[0], *self.moments) if self.trained else PARTS[:1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor and its moments, all in fp32."""
        return math.prod(self.shape) * len(self.parts) * FP32_BYTES

    def to_json(self) -> dict[str, Any]:
        """Return the record as the manifest holds it: `moments` only where they are not Adam's."""
        plain = asdict(self)
        if self.moments == MOMENTS:
            del plain["moments"]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TensorRecord:
        """Return the record that a manifest holds."""
        moments = tuple(plain.get("moments", MOMENTS))
        return cls(**{**plain, "shape": tuple(plain["shape"]), "moments": moments})


def fp32_records(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRecord]:
    """Return the records of trained tensors of these shapes, by name."""
    records = {}
    for name, shape in shapes.items():
        records[name] = TensorRecord(shape=shape, dtype="float32")
    return records


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The description of a checkpoint: everything but its tensors."""

    step: int
    """Optimizer steps done."""
    files: tuple[FileRecord, ...]
    """Every file but the manifest."""
    tensors: dict[str, TensorRecord]
    """Record of each parameter by name; it is stored as master and, if it was trained, exp_avg and
    exp_avg_sq.
    """
    layout: dict[str, int]
    """world_size, sp_size, ep_size, zero_stage of the run that wrote it."""
    versions: dict[str, str]
    """Versions of the software that wrote it."""
    state: dict[str, Any]
    """Tokens seen, data position, configuration; JSON values only."""
    format: int = FORMAT_VERSION
    """Version of the form in which the checkpoint is stored."""


def hash_file(path: Path, at_chunk: AtChunk = no_call) -> str:
    """Return the xxh3-128 of a file's content."""
    with open_regular(path, follow_links=False) as file:
        return xxh3_of_open(file, at_chunk)


def record_file(path: Path) -> FileRecord:
    """Return the size and hash of a file that was just written."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, xxh3_128=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json; the directory counts from the rename that follows."""
    body = asdict(manifest)
    body["tensors"] = {name: record.to_json() for name, record in manifest.tensors.items()}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
    write_text(folder / MANIFEST, text)


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against itself; the files are not looked at.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        return _parse(path, _read_small_file(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, so the directory is not a complete checkpoint."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable manifest ({escaped_line(error, 500)})."
        ) from error


def _read_small_file(path: Path) -> bytes:
    with open_regular(path, follow_links=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_MANIFEST_BYTES:
            raise CheckpointError(
                f"{path}: larger than {_LARGEST_MANIFEST_BYTES} bytes; not one of ours."
            )
        return file.read(size)


def _parse(path: Path, content: bytes) -> Manifest:
    # An empty list takes two bytes in the file and 64 in memory.
    num_values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if num_values > _MOST_VALUES:
        raise CheckpointError(f"{path}: more than {_MOST_VALUES} values; not one of ours.")
    body = parse_json(content, unique=True)
    checksum = body.pop("checksum")
    if type(body["format"]) is not int or body["format"] not in READABLE_FORMATS:
        raise CheckpointError(
            f"{path}: format {body['format']!r}, this version reads {READABLE_FORMATS[0]} to "
            f"{READABLE_FORMATS[-1]}. Use the version of gpt-oss-cpt that wrote it, or a newer one."
        )
    if _checksum(body) != checksum:
        raise CheckpointError(f"{path}: its checksum does not match its content.")
    files = tuple(FileRecord(**record) for record in body.pop("files"))
    tensors = {}
    for name, record in body.pop("tensors").items():
        tensors[name] = TensorRecord.from_json(record)
    manifest = Manifest(files=files, tensors=tensors, **body)
    _check_types(manifest)
    for file in manifest.files:
        name = file.name
        if Path(name).name != name or name in (".", "..", MANIFEST) or "\0" in name:
            raise CheckpointError(
                f"{path.parent.name}: the manifest names {name!r}, which is not a plain file name."
            )
    _check_total(path, manifest)
    return manifest


def _check_total(path: Path, manifest: Manifest) -> None:
    """Refuse files that are larger than the tensors need; a sparse one costs its author nothing."""
    listed = sum(file.bytes for file in manifest.files)
    needed = sum(tensor.stored_bytes for tensor in manifest.tensors.values())
    allowed = needed + _BYTES_PER_FOLDER
    allowed += _BYTES_PER_TENSOR * len(manifest.tensors)
    allowed += _BYTES_PER_RANGE * most_ranges(manifest)
    if listed > allowed:
        raise CheckpointError(
            f"{path}: lists files of {listed:,} bytes, though its tensors need {needed:,}."
        )


def most_ranges(manifest: Manifest) -> int:
    """Return the number of ranges that a checkpoint has at most.

    A tensor has at most one range in each file, and each range has an element.
    """
    num_ranges = 0
    for record in manifest.tensors.values():
        num_ranges += len(record.parts) * min(len(manifest.files), math.prod(record.shape))
    return num_ranges


def _check_types(manifest: Manifest) -> None:
    """Check the types of all values.

    A valid checksum does not make a valid manifest, because its author may be somebody else.
    """
    counts = [manifest.step, *manifest.layout.values()]
    texts = [*manifest.versions.values()]
    for file in manifest.files:
        counts.append(file.bytes)
        texts += [file.name, file.xxh3_128]
    for tensor in manifest.tensors.values():
        counts += tensor.shape
        texts.append(tensor.dtype)
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("a step, size, shape or layout is no whole number")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name, hash, version or dtype is no text")
    if not all(type(record.trained) is bool for record in manifest.tensors.values()):
        raise ValueError("trained is neither true nor false")
    if not all(_are_moments(record.moments) for record in manifest.tensors.values()):
        raise ValueError("moments are no selection of Adam's")
    if not isinstance(manifest.state, dict):
        raise ValueError("state is no mapping")
    for name, tensor in manifest.tensors.items():
        too_large = len(tensor.shape) > _LARGEST_RANK or math.prod(tensor.shape) >= 2**61
        if too_large or 0 in tensor.shape or len(name) > _LONGEST_NAME:
            raise ValueError(f"{name[:_LONGEST_NAME]!r} is no tensor of a model")


def _are_moments(moments: tuple[Any, ...]) -> bool:
    """Return whether each is one of Adam's moments, and none is there twice."""
    return all(moment in MOMENTS for moment in moments) and len(set(moments)) == len(moments)


def verify_files(folder: Path, manifest: Manifest, at_chunk: AtChunk = no_call) -> None:
    """Compare every file with the manifest.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        at_chunk: See `AtChunk`.

    Raises:
        CheckpointError: a file is missing, unknown, not a regular file, or differs in size or
            hash.
    """
    check_listing(folder, manifest)
    check_hashes(folder, manifest.files, at_chunk)


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Compare names, kinds and sizes of all files with the manifest; nothing is opened.

    Raises:
        CheckpointError: a file that is missing, unknown, not a regular file, or of another size.
    """
    listed = {record.name: record for record in manifest.files}
    present = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    if unknown := sorted(present - listed.keys()):
        raise CheckpointError(f"{folder.name}/{escaped_line(unknown[0])}: not in the manifest.")
    for name, record in sorted(listed.items()):
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder.name}/{escaped_line(name)}: missing, though the manifest lists it."
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{folder.name}/{escaped_line(name)}: not a regular file.")
        if status.st_size != record.bytes:
            raise CheckpointError(
                f"{folder.name}/{escaped_line(name)}: {status.st_size} bytes, manifest says "
                f"{record.bytes}."
            )


def check_hashes(folder: Path, files: Iterable[FileRecord], at_chunk: AtChunk = no_call) -> None:
    """Compare the content of some files with their records.

    Args:
        folder: The checkpoint.
        files: The records.
        at_chunk: See `AtChunk`.

    Raises:
        CheckpointError: a file differs or cannot be read; the first one is named.
    """
    records = sorted(files, key=lambda record: record.name)
    total = sum(record.bytes for record in records)
    bar = show_progress(total, f"hashes of {folder.name}", "B", unit_scale=True, leave=False)
    with bar:
        for record in records:
            _check_hash(folder, record, at_chunk)
            bar.update(record.bytes)


def _check_hash(folder: Path, record: FileRecord, at_chunk: AtChunk) -> None:
    try:
        differs = hash_file(folder / record.name, at_chunk) != record.xxh3_128
    except OSError as error:
        raise CheckpointError(
            f"{folder.name}/{escaped_line(record.name)}: cannot be read ({error.strerror})."
        ) from error
    if differs:
        raise CheckpointError(
            f"{folder.name}/{escaped_line(record.name)}: its content does not match the "
            "manifest's hash."
        )


def share_of_files(files: Sequence[FileRecord], rank: int, world_size: int) -> list[FileRecord]:
    """Return the files that one rank hashes, so that all hash about as many bytes."""
    sizes = {record.name: record.bytes for record in files}
    names = divide_among_all(sizes, world_size)[rank]
    return [record for record in files if record.name in names]
