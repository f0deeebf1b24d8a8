"""The range index: which bytes of which file hold which elements of which tensor.

`ranges.json` says what `.metadata` of torch.distributed.checkpoint says, as numbers and names and
nothing else. The manifest lists it with its hash. For every stored tensor, `part/parameter name`,
it holds three lists of the same length, one entry for each range, in the order of the elements:

    "master/lm_head.weight": {"file": [0, 1], "offset": [704, 704], "numel": [3072, 3072]}

`file` counts in the list `files`, `offset` is the first byte of the values in that file (fp32,
little-endian), and `numel` is the number of elements. The first element of a range is the sum of
those before it, so the ranges of a tensor cannot overlap or leave a gap.

The author of a checkpoint may be somebody else. Memory is bounded before the text is parsed, and an
index is used only if each of its ranges lies inside a file that the manifest lists, no byte belongs
to two ranges, and every tensor of the manifest is there with all its elements.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from cpt.checkpoint.manifest import (
    METADATA,
    RANGES,
    FileRecord,
    Manifest,
    TensorRecord,
    most_ranges,
)
from cpt.checkpoint.old_metadata import OldRange, read_old_metadata
from cpt.errors import CheckpointError, InternalError
from cpt.storage.state_bytes import FP32_BYTES
from data_pipeline.bounded.files import open_regular
from data_pipeline.store.files import write_text

Integers = npt.NDArray[np.int64]

MOST_INDEX_BYTES = 256 * 2**20
"""About ten million ranges: gpt-oss-120b on 5,000 ranks."""
_BYTES_PER_RANGE = {RANGES: 64, METADATA: 256}
_BYTES_PER_TENSOR = 2048
_OPCODES_PER_RANGE = 96
_OPCODES_PER_TENSOR = 256
_LISTS = ("file", "offset", "numel")


class WrittenRange(NamedTuple):
    """One range of a tensor and its place in a file; it travels between ranks as a JSON list."""

    key: str
    """Part and parameter name, joined by a slash."""
    offset: int
    """First element in the flattened global tensor."""
    numel: int
    """Number of elements."""
    global_numel: int
    """Number of elements of the global tensor."""
    file: str
    """Name of the file."""
    file_offset: int
    """First byte of the range's archive in the file."""
    file_bytes: int
    """Bytes of the archive."""
    values_offset: int
    """First byte of the values in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """The ranges of one stored tensor, in the order of its elements; R ranges."""

    starts: Integers
    """First element of each range, and the number of elements of the tensor; [R + 1]."""
    files: Integers
    """Number of each range's file in `RangeIndex.files`; [R]."""
    offsets: Integers
    """First byte of each range in its file; [R]."""
    lengths: Integers
    """Bytes of each range in its file; [R]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeIndex:
    """Where the tensors of a checkpoint lie; every range has been checked."""

    files: tuple[str, ...]
    """Names of the files that hold ranges."""
    tensors: dict[str, StoredTensor]
    """Ranges of every stored tensor by its key, `part/parameter name`."""
    are_archives: bool
    """Whether offsets and lengths are those of archives (checkpoints of format 1), not of the
    values themselves.
    """


def group_ranges(written: Iterable[WrittenRange]) -> dict[str, list[WrittenRange]]:
    """Return what all ranks wrote by key, in the order of keys and of elements.

    Raises:
        InternalError: the ranges do not cover each tensor exactly once.
    """
    ranges: dict[str, list[WrittenRange]] = defaultdict(list)
    for one in written:
        ranges[one.key].append(one)
    grouped = {}
    for key, parts in sorted(ranges.items()):
        parts.sort(key=lambda part: part.offset)
        _check_tiling(key, parts)
        grouped[key] = parts
    return grouped


def _check_tiling(key: str, parts: list[WrittenRange]) -> None:
    """Refuse ranges, sorted by offset, that do not cover the tensor exactly once."""
    global_numel = parts[0].global_numel
    covered = 0
    has_gap_or_overlap = False
    for part in parts:
        has_gap_or_overlap |= part.offset != covered
        covered = part.offset + part.numel
    if has_gap_or_overlap or covered != global_numel:
        raise InternalError(
            f"the ranks' ranges of '{key}' do not cover its {global_numel} elements once."
        )


def write_range_index(folder: Path, grouped: dict[str, list[WrittenRange]]) -> None:
    """Write `ranges.json`, one tensor a line.

    Args:
        folder: The folder of the checkpoint.
        grouped: See `group_ranges`.

    Raises:
        InternalError: there are more ranges than would be read.
    """
    names: set[str] = set()
    for parts in grouped.values():
        names.update(part.file for part in parts)
    files = sorted(names)
    numbers = {name: number for number, name in enumerate(files)}
    lines = []
    for key, parts in grouped.items():
        entry = {
            "file": [numbers[part.file] for part in parts],
            "offset": [part.values_offset for part in parts],
            "numel": [part.numel for part in parts],
        }
        lines.append(f"{json.dumps(key)}: {json.dumps(entry, separators=(',', ':'))}")
    tensors = ",\n".join(lines)
    text = f'{{"files": {json.dumps(files)},\n"tensors": {{\n{tensors}\n}}}}\n'
    if len(text) > MOST_INDEX_BYTES:
        raise InternalError(
            f"{RANGES} would have {len(text):,} bytes; no more than {MOST_INDEX_BYTES:,} are read."
        )
    write_text(folder / RANGES, text)


def read_range_index(folder: Path, manifest: Manifest) -> RangeIndex:
    """Read where the tensors of a checkpoint lie, and check every range.

    Raises:
        CheckpointError: the index is damaged, is not the one that the manifest lists, or leads
            anywhere but to the tensors of the manifest in the files of the manifest.
    """
    name = METADATA if manifest.format == 1 else RANGES
    where = f"{folder.name}/{name}"
    try:
        content = _listed_content(folder, name, manifest)
        if manifest.format == 1:
            old = read_old_metadata(content, most_opcodes=_expected_opcodes(manifest))
            index = index_of_archives(old)
        else:
            index = _parse(content, manifest)
        _check_ranges(index, manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: not readable ({type(error).__name__}: {error})."
        ) from error
    return index


def _listed_content(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Return the bytes that the manifest lists, whatever has happened to the file since."""
    record = _record_of(name, manifest)
    limit = min(MOST_INDEX_BYTES, _expected_bytes(name, manifest))
    if record.bytes > limit:
        raise CheckpointError(
            f"{record.bytes:,} bytes, more than the {limit:,} that the manifest's "
            f"{len(manifest.tensors)} tensors in {len(manifest.files)} files could need."
        )
    with open_regular(folder / name, follow_links=False) as file:
        content = file.read(record.bytes + 1)
    if len(content) != record.bytes or xxhash.xxh3_128_hexdigest(content) != record.xxh3_128:
        raise CheckpointError("its content does not match the manifest's hash.")
    return content


def _record_of(name: str, manifest: Manifest) -> FileRecord:
    for record in manifest.files:
        if record.name == name:
            return record
    raise CheckpointError("not in the manifest, so the tensors cannot be found.")


def _expected_bytes(name: str, manifest: Manifest) -> int:
    """Return more bytes than an honest index of these tensors in these files can have."""
    for_tensors = _BYTES_PER_TENSOR * len(stored_tensors(manifest))
    return 2**16 + for_tensors + _BYTES_PER_RANGE[name] * most_ranges(manifest)


def _expected_opcodes(manifest: Manifest) -> int:
    """Return more opcodes than an honest `.metadata` of these tensors in these files can have."""
    for_tensors = _OPCODES_PER_TENSOR * len(stored_tensors(manifest))
    return 2**12 + for_tensors + _OPCODES_PER_RANGE * most_ranges(manifest)


def stored_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """Return the record of every stored tensor by its key, `part/parameter name`."""
    wanted = {}
    for name, record in manifest.tensors.items():
        for part in record.parts:
            wanted[f"{part}/{name}"] = record
    return wanted


def _parse(content: bytes, manifest: Manifest) -> RangeIndex:
    # An empty list in JSON takes two bytes, in memory 64. Numbers are the cheapest to parse, so
    # their memory is bounded by the size of the file.
    num_keys = len(stored_tensors(manifest))
    if content.count(b"[") + content.count(b"{") > 4 * num_keys + 3:
        raise CheckpointError("more lists than the manifest's tensors could need.")
    if content.count(b'"') > 8 * num_keys + 2 * len(manifest.files) + 4:
        raise CheckpointError("more names than the manifest's tensors and files could need.")
    body = json.loads(content.decode("ascii"))
    if type(body) is not dict or type(body.get("tensors")) is not dict:
        raise ValueError("its top or its tensors are no mapping")
    files = tuple(body["files"])
    if not all(type(name) is str for name in files):
        raise ValueError("a file's name is no text")
    # under two numbers, the same bytes would count as those of two files
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    tensors = {}
    for key, entry in body["tensors"].items():
        if type(entry) is not dict or set(entry) != set(_LISTS):
            raise ValueError(f"{key!r} does not have the lists {', '.join(_LISTS)}")
        tensors[key] = _stored_tensor(key, *(_integers(entry[name], key) for name in _LISTS))
    return RangeIndex(files=files, tensors=tensors, are_archives=False)


def _integers(values: Any, key: str) -> Integers:
    """Return a list of whole numbers, none negative, as an array."""
    if type(values) is not list or not set(map(type, values)) <= {int}:
        raise ValueError(f"{key!r} has a list that holds something else than whole numbers")
    numbers = np.array(values, dtype=np.int64)  # OverflowError beyond 64 bits
    if numbers.size and numbers.min() < 0:
        raise ValueError(f"{key!r} has a negative number")
    return numbers


def _stored_tensor(key: str, files: Integers, offsets: Integers, numels: Integers) -> StoredTensor:
    if not len(files) == len(offsets) == len(numels):
        raise ValueError(f"{key!r} has lists of different lengths")
    if numels.size and not 0 < numels.min() <= numels.max() < 2**63 // FP32_BYTES:
        raise ValueError(f"{key!r} has a range without elements, or with too many")
    return StoredTensor(
        starts=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(numels)]),
        files=files,
        offsets=offsets,
        lengths=numels * FP32_BYTES,
    )


def index_of_archives(old: dict[str, list[OldRange]]) -> RangeIndex:
    """Return the index of a checkpoint of format 1, not yet compared with its manifest.

    Raises:
        CheckpointError: the ranges of a tensor leave a gap or overlap.
    """
    names: set[str] = set()
    for ranges in old.values():
        names.update(one.file for one in ranges)
    files = sorted(names)
    numbers = {name: number for number, name in enumerate(files)}
    tensors = {}
    for key, ranges in old.items():
        starts = [one.offset for one in ranges]
        ends = [one.offset + one.numel for one in ranges]
        if starts != [0, *ends[:-1]]:
            raise CheckpointError(f"the ranges of {key!r} leave a gap or overlap.")
        tensors[key] = StoredTensor(
            starts=np.array([0, *ends], dtype=np.int64),
            files=np.array([numbers[one.file] for one in ranges], dtype=np.int64),
            offsets=np.array([one.file_offset for one in ranges], dtype=np.int64),
            lengths=np.array([one.file_bytes for one in ranges], dtype=np.int64),
        )
    return RangeIndex(files=tuple(files), tensors=tensors, are_archives=True)


def _check_ranges(index: RangeIndex, manifest: Manifest) -> None:
    """Compare an index with the manifest.

    Raises:
        CheckpointError: they do not have the same tensors and sizes, or a range does not lie inside
            a file of the manifest.
    """
    sizes = {record.name: record.bytes for record in manifest.files}
    strange = set(index.files) - sizes.keys()
    if strange:
        raise CheckpointError(f"points to {min(strange)!r}, which is not in the manifest.")
    file_bytes = np.array([sizes[name] for name in index.files], dtype=np.int64)
    wanted = stored_tensors(manifest)
    different = sorted(index.tensors.keys() ^ wanted.keys())
    if different:
        raise CheckpointError(f"{different[0]!r} is not in both it and the manifest.")
    for key, record in wanted.items():
        tensor = index.tensors[key]
        if record.dtype != "float32":
            raise CheckpointError(
                f"{key!r} is {record.dtype!r} in the manifest, stored are only float32 values."
            )
        numel = math.prod(record.shape)
        # A sum of forged numbers that leaves 64 bits is negative for a while.
        if tensor.starts[-1] != numel or tensor.starts.min() < 0:
            raise CheckpointError(f"the ranges of {key!r} do not cover its {numel} elements once.")
        _check_places(key, tensor, file_bytes)
    _check_no_byte_twice(index)


def _check_places(key: str, tensor: StoredTensor, file_bytes: Integers) -> None:
    """Refuse ranges that leave their files, or are smaller than their values."""
    if tensor.files.size == 0:
        return
    if tensor.files.max() >= len(file_bytes):
        raise CheckpointError(f"a range of {key!r} is in a file that is not listed.")
    available = file_bytes[tensor.files] - tensor.offsets
    if (available < tensor.lengths).any():
        raise CheckpointError(f"a range of {key!r} goes beyond the end of its file.")
    if (tensor.lengths // FP32_BYTES < np.diff(tensor.starts)).any():
        raise CheckpointError(f"a range of {key!r} has fewer bytes than its elements need.")


def _check_no_byte_twice(index: RangeIndex) -> None:
    """Refuse ranges that share bytes: a small file could pose as tensors of any size."""
    if not index.tensors:
        return
    tensors = index.tensors.values()
    files = np.concatenate([tensor.files for tensor in tensors])
    offsets = np.concatenate([tensor.offsets for tensor in tensors])
    ends = offsets + np.concatenate([tensor.lengths for tensor in tensors])
    order = np.lexsort((offsets, files))
    same_file = files[order][1:] == files[order][:-1]
    overlap = offsets[order][1:] < ends[order][:-1]
    if (same_file & overlap).any():
        file = index.files[files[order][1:][same_file & overlap][0]]
        raise CheckpointError(f"two ranges share bytes of {file!r}.")
