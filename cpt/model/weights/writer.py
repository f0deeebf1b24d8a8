"""Hugging Face weight files written piece by piece; memory never holds a file or a whole tensor.

safetensors' own `save_file` wants all tensors of a file at once. The format is an 8-byte length, a
JSON header with dtype, shape and byte range of every tensor, and the bytes. So the header is
written first, and pieces go to their place. A file gets its name when it is whole, and the index
comes last.

Source: safetensors, README, section Format.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cpt.errors import ConfigError, InternalError
from cpt.model.weights.checksums import write_sums
from cpt.model.weights.hf_layout import INDEX_FILE, SINGLE_FILE
from cpt.storage.space import check_space, write_error
from data_pipeline.bounded.files import read_small_file
from data_pipeline.store.boot import this_boot
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.files import (
    FOLDER_MODE,
    AtChunk,
    AtomicFile,
    make_folder,
    no_call,
    no_links,
    sync_directory,
    write_json,
)

LEFTOVER_SECONDS = 24 * 3600.0
"""Age at which an unfinished directory counts as left by a killed process."""
LARGEST_FILE_BYTES = 4 * 2**30
"""A file holds at least one tensor, and more as long as it stays below this."""
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of the directory before its values are known."""

    shape: tuple[int, ...]
    """Shape of the stored tensor."""
    dtype: torch.dtype
    """Dtype of the stored tensor."""

    @property
    def num_bytes(self) -> int:
        """The size of its values in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """One safetensors file being written; `finish` gives it its name."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._left = {name: math.prod(entry.shape) for name, entry in entries.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, entry in entries.items():
            begin = end
            end += entry.num_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in entries}
        self._atomic = AtomicFile(path)
        self._opened = self._atomic.file
        self._opened.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        entry = self._entries[name]
        assert values.dtype == entry.dtype, (name, values.dtype)
        self._opened.seek(self._start[name] + start * entry.dtype.itemsize)
        self._opened.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._left[name] -= values.numel()

    @property
    def whole(self) -> bool:
        return not any(self._left.values())

    def finish(self) -> None:
        self._atomic.publish()

    def close(self) -> None:
        self._atomic.discard()


class DirectoryWriter:
    """The weight files of a Hugging Face directory; use it as a context manager.

    Tensors are written in the order of `entries`, each in pieces; a file is finished when its last
    piece is there.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, Entry], at_chunk: AtChunk = no_call
    ) -> None:
        """Prepare to write.

        Args:
            folder: The directory.
            entries: All tensors, in the order in which they are written.
            at_chunk: Called after each piece that is written, and each file that is hashed.
        """
        self._folder = folder
        self._at_chunk = at_chunk
        groups = _grouped(entries)
        count = len(groups)
        self._names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            self._names = [SINGLE_FILE]
        self._groups = dict(zip(self._names, groups, strict=True))
        self._file_of: dict[str, str] = {}
        for file, group in self._groups.items():
            self._file_of |= dict.fromkeys(group, file)
        self._total_bytes = sum(entry.num_bytes for entry in entries.values())
        self._open: dict[str, TensorFileWriter] = {}
        self._done: set[str] = set()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put elements [start, start + len(values)) of a flattened tensor into their file."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = TensorFileWriter(self._folder / file, self._groups[file])
        self._open[file].write(name, start, values)
        if self._open[file].whole:
            self._open.pop(file).finish()
            self._done.add(file)
        self._at_chunk()

    def __enter__(self) -> DirectoryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.close()
        if error is not None:
            return
        missing = sorted(set(self._names) - self._done)
        if missing:
            raise InternalError(
                f"{self._folder}: not every tensor of {', '.join(missing)} was written."
            )
        if len(self._names) > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._file_of}
            write_json(self._folder / INDEX_FILE, index, indent=2, sort_keys=True)
        write_sums(self._folder, self._names, self._at_chunk)


def _grouped(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    groups: list[dict[str, Entry]] = []
    size = 0
    for name, entry in entries.items():
        if not groups or size + entry.num_bytes > LARGEST_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.num_bytes
    return groups


def refuse_existing(out: Path) -> None:
    """Refuse to write where something exists.

    Raises:
        ConfigError: `out` exists.
    """
    if out.exists():
        raise ConfigError(
            f"{out} exists already and is not overwritten. Remove it or give another --out."
        )


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """Give a directory to fill, and rename it to `out` at the end; after a failure nothing is left.

    Its name until then cannot be guessed, and is not that of another process that writes `out`.
    What a killed process has left is removed: at once if it was one of this machine, which the lock
    beside the directory tells, and else when nothing has changed in it for a day.

    Raises:
        ConfigError: `out` exists.
        StorageError: A file could not be written.
    """
    refuse_existing(out)
    _remove_leftovers(out)
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(8)}")
    try:
        make_folder(out.parent)
        with file_lock(_lock_of(temporary), is_kept=False):
            with open(_lock_of(temporary), "w", encoding="ascii", opener=no_links) as lock:
                lock.write(this_boot())
            temporary.mkdir(mode=FOLDER_MODE)
            yield temporary
            sync_directory(temporary)
            os.rename(temporary, out)
            sync_directory(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, out.parent) from error
        raise


def _remove_leftovers(out: Path) -> None:
    """Remove what processes of this user that were killed have left beside `out`."""
    for folder in out.parent.glob(f".tmp-{glob.escape(out.name)}-*"):
        suffix = folder.name.removeprefix(f".tmp-{out.name}-")
        if not re.fullmatch(r"[0-9a-f]{16}", suffix) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError, ConfigError):
            if folder.stat().st_uid == os.geteuid() and _is_left(folder):
                shutil.rmtree(folder)
                _lock_of(folder).unlink(missing_ok=True)


def _is_left(folder: Path) -> bool:
    """Return whether the process that was filling a directory is certainly gone."""
    lock = _lock_of(folder)
    with contextlib.suppress(OSError, ValueError):
        machine = read_small_file(lock, follow_links=False).decode()
        if machine and machine == this_boot():
            try:
                with file_lock(lock) as is_locked:
                    if is_locked:
                        return True
            except LockHeld:
                return False
    # the clocks of the file system and of this machine may differ, but not by a day
    return time.time() - _last_change(folder) > LEFTOVER_SECONDS


def _lock_of(temporary: Path) -> Path:
    """Return the file that is locked while a directory is filled; it names the machine."""
    return temporary.with_name(f"{temporary.name}.lock")


def _last_change(folder: Path) -> float:
    """Return when a folder or anything in it was written last, as Unix time."""
    newest = folder.stat().st_mtime
    for path in folder.rglob("*"):
        newest = max(newest, path.lstat().st_mtime)
    return newest


def check_weights_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StorageError: The disk has less room than the weight files will take.
    """
    check_space(
        folder,
        num_bytes,
        claim="the weights need",
        margin=1.0,
        cure="Free some space, or give a place on another disk.",
    )
