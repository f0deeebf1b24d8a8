"""Objects of S3, and of every store that speaks its protocol: listed, looked at, read by ranges.

Decisions
    Credentials are those of the environment, of ~/.aws or of the machine, found by the AWS library
    inside pyarrow; this project neither reads nor shows them. What a server says of an error is not
    shown either, only the name of the error.
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another store than that of AWS. Without `http://`
    in it, the connection is encrypted.
    A store that does not answer is asked ATTEMPTS times, and not once more by this process.
    An object is known by its ETag: whoever opens a version gets that one or an error.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import xxhash

from data_pipeline.errors import StorageError

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

ATTEMPTS = 4
"""How often a request is made until the store counts as out of reach."""
REQUESTS_AT_ONCE = 32
"""Requests that wait for the store at the same time while objects are looked at."""
_CONNECT_SECONDS = 10.0
_SILENT_SECONDS = 15.0
"""How long a request may wait for its next byte."""
_FIRST_READ_BYTES = 2**16
_LARGEST_READ_BYTES = 2**23
_BUFFER_BYTES = 2**16
_SECOND_NS = 10**9
_AWS_ERROR = re.compile(r"AWS Error ([A-Z0-9_]+)")
_NO_BUCKET = ("NO_SUCH_BUCKET", "INVALID_BUCKET_NAME")
_REFUSED = (
    "ACCESS_DENIED",
    "EXPIRED_TOKEN",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "MISSING_AUTHENTICATION_TOKEN",
    "REQUEST_EXPIRED",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
)
_CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectVersion:
    """One version of an object."""

    size_bytes: int
    etag: str
    """What the store calls the content, and its version where the bucket keeps versions."""
    modified_ns: int
    """Time of its upload since the epoch, in whole seconds."""
    number: int
    """64 bits that no other object and no other version has."""


_OUT_OF_REACH: dict[str, str] = {}
"""Why a bucket did not answer this process."""
_SEEN: dict[str, tuple[tuple[int, int], ObjectVersion]] = {}
"""Size and time that a listing gave of an object, and its version then.

An object that is rewritten within a second may look the same in a listing. The version is then an
older one, which cannot be opened any more.
"""


def current_version(key: str) -> ObjectVersion:
    """Return the version that an object has now.

    Args:
        key: Bucket and key, as `bucket/folder/name`.

    Raises:
        OSError: there is no such object, or it may not be read.
        StorageError: the store does not answer.
    """
    with _explained(key), _store(key).open_input_file(key) as file:
        return _version(key, file)


def find_object(key: str) -> ObjectVersion | None:
    """Return the version of an object, or None if there is no such object.

    The arguments and errors are those of `current_version`.
    """
    from pyarrow.fs import FileType

    with _explained(key):
        if _store(key).get_file_info(key).type != FileType.File:
            return None
    return current_version(key)


def list_objects(folder: str, *, recursive: bool) -> list[str]:
    """Return the keys in a folder, each as `bucket/folder/name`; none if there is no such folder.

    Args:
        folder: Bucket, or bucket and folder.
        recursive: Whether to list the folders in it, too.

    Raises:
        OSError: there is no such bucket, or it may not be listed.
        StorageError: the store does not answer.
    """
    from pyarrow.fs import FileSelector, FileType

    store = _store(folder)
    with _explained(folder):
        try:
            infos = store.get_file_info(FileSelector(folder, recursive=recursive))
        except FileNotFoundError:
            bucket = folder.partition("/")[0]
            if store.get_file_info(bucket).type == FileType.NotFound:
                raise OSError(f"AWS Error {_NO_BUCKET[0]}") from None
            return []
    keys = []
    for info in infos:
        if info.type == FileType.File:
            keys.append(info.path)
            seen = _SEEN.get(info.path)
            if seen is not None and seen[0] != (
                info.size,
                info.mtime_ns // _SECOND_NS * _SECOND_NS,
            ):
                del _SEEN[info.path]
    return keys


def versions_of(keys: list[str]) -> list[ObjectVersion]:
    """Return the version of each object; what this process has seen is not asked for again.

    The errors are those of `current_version`.
    """
    unseen = [key for key in keys if key not in _SEEN]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for key, version in zip(unseen, pool.map(current_version, unseen), strict=True):
            _SEEN[key] = ((version.size_bytes, version.modified_ns), version)
    return [_SEEN[key][1] for key in keys]


def open_object(key: str, version: ObjectVersion | None) -> io.BufferedReader:
    """Open an object; every piece of it is a request of its own.

    Args:
        key: Bucket and key, as `bucket/folder/name`.
        version: The version that is meant; None for the one that is there.

    Raises:
        OSError: there is no such object or version, or it may not be read.
        StorageError: the store does not answer; also while it is read.
    """
    with _explained(key):
        file = _store(key).open_input_file(key)
        found = _version(key, file)
    if version is not None and found != version:
        file.close()
        raise OSError(
            0, "the object was written anew since the bucket was listed; build again", _shown(key)
        )
    return io.BufferedReader(_RangeReader(key, file, found.size_bytes), _BUFFER_BYTES)


class _RangeReader(io.RawIOBase):
    """An object that is read in pieces, which grow as long as it is read from front to back."""

    def __init__(self, key: str, file: Any, size_bytes: int) -> None:
        self._key = key
        self._file = file
        self._size_bytes = size_bytes
        self._position = 0
        self._piece = memoryview(b"")
        self._piece_start = 0
        self._read_bytes = _FIRST_READ_BYTES // 2

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, target: Any) -> int:
        if self._position >= self._size_bytes:
            return 0
        start = self._position - self._piece_start
        if not 0 <= start < len(self._piece):
            self._fetch(len(target))
            start = self._position - self._piece_start
        piece = self._piece[start : start + len(target)]
        target[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _fetch(self, num_wanted: int) -> None:
        """Read a piece that the position is in: at its start, or in the last one of the object.

        The end of a Parquet file is read backwards. And a store that refuses a piece of a few bytes
        has no room in it for the reason.
        """
        start = self._position
        if self._position == self._piece_start + len(self._piece):
            self._read_bytes = min(2 * self._read_bytes, _LARGEST_READ_BYTES)
        else:
            self._read_bytes = _FIRST_READ_BYTES
            start = max(min(start, self._size_bytes - _FIRST_READ_BYTES), 0)
        num_bytes = max(self._read_bytes, num_wanted)
        num_bytes = min(num_bytes, self._size_bytes - start)
        self._piece = memoryview(b"")  # before the next one is read
        with _explained(self._key):
            piece = self._file.read_at(num_bytes, start)
        if len(piece) != num_bytes:
            raise OSError(0, "truncated: the store sent less than was asked for", _shown(self._key))
        self._piece = memoryview(piece)
        self._piece_start = start


def _version(key: str, file: Any) -> ObjectVersion:
    """Return the version of an object that is open."""
    facts = {}
    for name, value in file.metadata().items():
        facts[_text(name)] = _text(value)
    etag = " ".join(filter(None, (facts.get("ETag"), facts.get("VersionId"))))
    size_bytes = file.size()
    modified = facts.get("Last-Modified", "")
    number = xxhash.xxh3_64_intdigest(f"{key}\0{etag}\0{size_bytes}\0{modified}".encode())
    return ObjectVersion(
        size_bytes=size_bytes,
        etag=etag,
        modified_ns=_nanoseconds(modified),
        number=number >> 1,  # as an inode, it has a sign
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _nanoseconds(time: str) -> int:
    """Return a time of ISO 8601 in nanoseconds since the epoch; 0 for anything else."""
    try:
        return int(datetime.fromisoformat(time).timestamp()) * _SECOND_NS
    except ValueError:
        return 0


def _store(key: str) -> S3FileSystem:
    bucket = key.partition("/")[0]
    if bucket in _OUT_OF_REACH:
        raise StorageError(_OUT_OF_REACH[bucket])
    return _store_of(bucket)


@functools.lru_cache(maxsize=64)
def _store_of(bucket: str) -> S3FileSystem:
    """Return the store that a bucket is in."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, place = endpoint.rpartition("://")
        options = {"endpoint_override": place.rstrip("/"), "scheme": scheme or "https"}
        region = region or "us-east-1"
    if not region:
        with contextlib.suppress(OSError):
            region = resolve_s3_region(bucket)
    authorities = os.environ.get("AWS_CA_BUNDLE")
    if authorities:
        options["tls_ca_file_path"] = authorities
    return S3FileSystem(
        region=region,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_SILENT_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )


@contextlib.contextmanager
def _explained(key: str) -> Iterator[None]:
    """Turn an error of the store into one that says what to do, and nothing of a credential."""
    try:
        yield
    except OSError as error:
        found = _AWS_ERROR.search(str(error))
        code = found[1] if found else ""
        bucket = key.partition("/")[0]
        if code in _NO_BUCKET:
            raise OSError(
                0,
                f"there is no bucket '{bucket}' in this store. Correct its name, or set "
                "AWS_ENDPOINT_URL if the bucket is in another store than that of AWS",
                _shown(key),
            ) from None
        if code in _REFUSED:
            raise OSError(0, _why_refused(code), _shown(key)) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(2, "there is no such object", _shown(key)) from None
        _OUT_OF_REACH[bucket] = (
            f"{_shown(key)}: the store does not answer as it should ({code or 'no reason given'}). "
            f"What may pass was tried up to {ATTEMPTS} times. Check the network, AWS_ENDPOINT_URL "
            "and AWS_REGION, and start again; what is done is kept."
        )
        raise StorageError(_OUT_OF_REACH[bucket]) from None


def _why_refused(code: str) -> str:
    if any(os.environ.get(name) for name in _CREDENTIAL_VARIABLES):
        return (
            f"the store refuses the credentials ({code}). Check that they are valid and may list "
            "the bucket and read its objects (s3:ListBucket, s3:GetObject)"
        )
    return (
        f"the store refuses access ({code}), and the environment names no credentials. Set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; if those of ~/.aws or of the "
        "machine are meant, they may not list the bucket and read its objects"
    )


def _shown(key: str) -> str:
    return f"s3://{key}"
