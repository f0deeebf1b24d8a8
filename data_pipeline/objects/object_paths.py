"""Addresses and patterns of objects, `s3://bucket/folder/*.jsonl.zst`, as paths of input files.

Decisions
    An object is a Path that opens by requests, so that every reader of files reads objects. Methods
    that change files, or ask for what an object has not, fail: there is no such file on a disk.
    A path that a pattern gave stands for the version that was there then.
    Patterns mean what they mean for files: `*` and `?` stay within a folder and pass over names
    that begin with a dot, `**` is any number of folders.
    A key that no path can spell, such as `a//b`, is refused.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import PosixPath
from typing import Any

from data_pipeline.objects.s3_store import (
    ObjectVersion,
    current_version,
    find_object,
    list_objects,
    open_object,
    versions_of,
)

SCHEME = "s3://"
_ANY_DEPTH = "**"
_WILD = re.compile(r"[*?]")
"""What makes a key a pattern at once; brackets may be those of a name."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class ObjectPath(PosixPath):
    """The address of an object, which opens as a file does."""

    version: ObjectVersion | None = None
    """The version that is meant; None for the one that is there."""

    @classmethod
    def of(cls, key: str, version: ObjectVersion | None = None) -> ObjectPath:
        """Return the path of an object.

        Args:
            key: Bucket and key, as `bucket/folder/name`.
            version: The version that is meant; None for the one that is there.
        """
        path = cls(f"{SCHEME}{key}")
        path.version = version
        return path

    @property
    def key(self) -> str:
        """Bucket and key, as `bucket/folder/name`."""
        return str(self).removeprefix(SCHEME)

    def __str__(self) -> str:
        """Return the address; a path on a disk has no two slashes."""
        text = super().__str__()
        return text if text.startswith(SCHEME) else text.replace("s3:/", SCHEME, 1)

    def __fspath__(self) -> str:
        """Return the address, under which no file is found."""
        return str(self)

    def __reduce__(self) -> Any:
        """Return how to make the path in another process, with its version."""
        return ObjectPath.of, (self.key, self.version)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return size, times and number of the version.

        Raises:
            OSError: there is no such object, or it may not be read.
            StorageError: the store does not answer.
        """
        del follow_symlinks
        return _status(self.version or current_version(self.key))

    def current_status(self) -> os.stat_result:
        """Return size, times and number of the version that is there now; see `stat`."""
        return _status(current_version(self.key))

    def exists(self, **options: Any) -> bool:
        """Return whether there is an object of this address."""
        del options
        return self.version is not None or find_object(self.key) is not None

    def is_file(self, **options: Any) -> bool:
        """Return whether there is an object of this address."""
        return self.exists(**options)

    def is_symlink(self) -> bool:
        """Return False: no object is a link."""
        return False

    def open(  # type: ignore[override]  # bytes alone, and nothing to write
        self, mode: str = "r", buffering: int = -1, **options: Any
    ) -> BufferedReader:
        """Open the version for reading bytes.

        Raises:
            OSError: there is no such object or version, or it may not be read.
            StorageError: the store does not answer.
        """
        del buffering, options
        assert mode == "rb", f"{self}: objects are read as bytes, not opened with mode '{mode}'"
        return open_object(self.key, self.version)


def _status(version: ObjectVersion) -> os.stat_result:
    """Return what `os.stat` would say of a file that is a version of an object."""
    seconds = version.modified_ns // 10**9
    mode = stat.S_IFREG | stat.S_IRUSR
    basic = (mode, version.number, 0, 1, 0, 0, version.size_bytes, seconds, seconds, seconds)
    times = {"st_atime_ns", "st_mtime_ns", "st_ctime_ns"}
    return os.stat_result(basic, dict.fromkeys(times, version.modified_ns))


def is_address(pattern: str) -> bool:
    """Return whether a path of a mix names objects."""
    return pattern.startswith(SCHEME)


def address_problem(pattern: str) -> str | None:
    """Return what is wrong with an address, or None; the address itself is not shown.

    Somebody may have written a password into it.
    """
    bucket, _, key = pattern.removeprefix(SCHEME).partition("/")
    if "@" in bucket or ":" in bucket:
        return (
            "is an address with a user or port in it. Write s3://BUCKET/KEY; credentials come from "
            "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), the place of the store "
            "from AWS_ENDPOINT_URL."
        )
    if not _BUCKET.fullmatch(bucket):
        return f"names the bucket '{bucket:.80}', which is no name of a bucket."
    for segment in key.rstrip("/").split("/"):
        if segment in ("", ".", ".."):
            return (
                f"has the part '{segment}' between two slashes. Write s3://BUCKET/KEY, with a key "
                "of names."
            )
    return None


def find_objects(pattern: str) -> list[ObjectPath]:
    """Return the objects that an address or pattern names, sorted as files are.

    Raises:
        OSError: there is no such bucket, it may not be listed, or a key cannot be spelled.
        StorageError: the store does not answer.
    """
    problem = address_problem(pattern)
    if problem is not None:
        raise OSError(0, problem.rstrip("."))
    key = pattern.removeprefix(SCHEME)
    if not key.endswith("/") and not _WILD.search(key):
        version = find_object(key)
        if version is not None:
            return [ObjectPath.of(key, version)]
    if not glob.has_magic(key):
        list_objects(key.partition("/")[0], recursive=False)  # is there such a bucket?
        return []
    keys = _matching_keys(key.split("/"))
    paths = []
    for found, version in zip(keys, versions_of(keys), strict=True):
        paths.append(ObjectPath.of(found, version))
    return sorted(paths)


def _matching_keys(parts: Sequence[str]) -> list[str]:
    """Return the keys that match a pattern, given in its parts."""
    first = 1
    while not glob.has_magic(parts[first]):
        first += 1
    folder = "/".join(parts[:first])
    rest = parts[first:]
    keys = []
    for key in list_objects(folder, recursive=len(rest) > 1 or _ANY_DEPTH in rest):
        names = key.removeprefix(f"{folder}/").split("/")
        if not _matches(names, rest):
            continue
        if "" in names or "." in names or ".." in names:
            raise OSError(0, f"the key '{key:.200}' has an empty name or dots for one; copy it")
        keys.append(key)
    return keys


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Return whether the names of a key match the parts of a pattern."""
    if not parts:
        return not names
    if not names:
        return False
    is_hidden = names[0].startswith(".")
    if parts[0] == _ANY_DEPTH:
        if len(parts) == 1:
            return not any(name.startswith(".") for name in names)
        return _matches(names, parts[1:]) or (not is_hidden and _matches(names[1:], parts))
    if is_hidden and not parts[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])
