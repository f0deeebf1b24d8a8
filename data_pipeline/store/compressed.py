"""Compressed files as streams: gzip, zstd, xz and bzip2, of one member or of many.

Decisions
    Members (gzip), frames (zstd) and streams (xz, bzip2) that follow each other are one content.
    Zero bytes between them and behind them are padding, as gzip itself takes them; anything else
    behind the last one is an error, because a damaged member must not be dropped in silence.
    Output is made a buffer at a time, so a small file that stands for a huge one fills no memory.
    zstd is read with windows up to 2 GiB where `compression.zstd` (Python 3.14) or its backport is
    installed, and up to pyarrow's 128 MiB elsewhere.
"""

from __future__ import annotations

import bz2
import contextlib
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol, cast

from data_pipeline.store.file_kinds import COMPRESSED, FileKind, kind_of

BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 17
_HEAD_BYTES = 32
"""Bytes that tell whether another member follows."""
_MAX_WINDOW_LOG = 31
"""Binary logarithm of the largest window of zstd (`--long=31`)."""
_MAX_XZ_BYTES = 256 * 2**20
"""Memory that an xz file may ask for: four times what `xz -9` makes it need."""
_ZSTD_MODULES = ("compression.zstd", "backports.zstd")


class _Decoder(Protocol):
    """The interface of the decompressors of bz2, lzma and compression.zstd."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _GzipDecoder:
    """One member of gzip with that interface."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _MemberStream(io.RawIOBase):
    """The content of all members of a compressed file."""

    def __init__(self, raw: IO[bytes], kind: FileKind, new_decoder: Callable[[], _Decoder]) -> None:
        self._raw = raw
        self._kind = kind
        self._new_decoder = new_decoder
        self._decoder: _Decoder | None = None
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while self._decoder is not None or self._start_member():
            piece = self._decode(len(target))
            if piece:
                target[: len(piece)] = piece
                return len(piece)
        return 0

    def _start_member(self) -> bool:
        """Go to the next member; return whether there is one."""
        while True:
            self._input = self._input.lstrip(b"\0")
            if len(self._input) >= _HEAD_BYTES:
                break
            more = self._raw.read(_CHUNK_BYTES)
            if not more:
                break
            self._input += more
        if not self._input:
            return False
        if kind_of(self._input[:_HEAD_BYTES]) is not self._kind:
            raise OSError(
                f"behind the {self._kind.words} stands something else, beginning with "
                f"{self._input[:16]!r}"
            )
        self._decoder = self._new_decoder()
        return True

    def _decode(self, max_bytes: int) -> bytes:
        """Return some bytes of the member, at most `max_bytes`; none do not mean its end."""
        decoder = self._decoder
        assert decoder is not None
        at_end = False
        if decoder.needs_input and not self._input:
            self._input = self._raw.read(_CHUNK_BYTES)
            at_end = not self._input
        data = self._input
        self._input = b""
        piece = decoder.decompress(data, max_bytes)
        if decoder.eof:
            self._input = decoder.unused_data
            self._decoder = None
        elif at_end and not piece:
            raise OSError("truncated: the file ends inside its compressed data")
        return piece


class _NamedErrors(io.RawIOBase):
    """A stream that turns every error of a decompressor into an OSError that names the file."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream = stream
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            return int(self._stream.readinto(target))
        except MemoryError as error:
            reason = "its compression needs more memory than there is"
            raise OSError(0, reason, str(self._path)) from error
        except OSError as error:
            if error.filename is not None or error.strerror is not None:
                raise
            raise OSError(0, _reason(error), str(self._path)) from error
        except _decoder_errors() as error:
            raise OSError(0, _reason(error), str(self._path)) from error


def _reason(error: Exception) -> str:
    """Return what a decompressor found, with the cure where there is one."""
    text = str(error).rstrip(". \n") or type(error).__name__
    if "emory usage limit" in text:
        return (
            f"its xz dictionary needs more than the {_MAX_XZ_BYTES // 2**20} MiB that are given to "
            "it. Compress it anew: xz -dc FILE | xz > NEW"
        )
    if "too much memory" in text:
        return (
            "its zstd window is larger than the 128 MiB that pyarrow reads. Install "
            "backports.zstd (pip install backports.zstd), or compress it anew: "
            "zstd -dc --long=31 FILE | zstd -o NEW"
        )
    if "runcated" in text:
        return text
    return f"its compressed data is damaged ({text})"


@contextlib.contextmanager
def open_decompressed(path: Path, kind: FileKind) -> Iterator[IO[bytes]]:
    """Open a file that holds `kind`, and decompress it on the way; other kinds are plain.

    While it is read, damaged or cut-off data is an OSError that names the file and the reason.
    """
    with path.open("rb", buffering=BUFFER_BYTES) as raw:
        if kind not in COMPRESSED:
            yield raw
            return
        stream = io.BufferedReader(_NamedErrors(_decompressed(raw, kind), path), BUFFER_BYTES)
        yield cast("IO[bytes]", stream)


def _decompressed(raw: IO[bytes], kind: FileKind) -> Any:
    if kind is FileKind.GZIP:
        return _MemberStream(raw, kind, _GzipDecoder)
    if kind is FileKind.BZIP2:
        return _MemberStream(raw, kind, bz2.BZ2Decompressor)
    if kind is FileKind.XZ:
        return _MemberStream(raw, kind, _xz_decoder)
    zstd = _zstd_module()
    if zstd is not None:
        return _MemberStream(raw, kind, lambda: _zstd_decoder(zstd))
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"), BUFFER_BYTES)


def _xz_decoder() -> _Decoder:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_BYTES)


def _zstd_decoder(zstd: ModuleType) -> _Decoder:
    options = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
    return cast("_Decoder", zstd.ZstdDecompressor(options=options))


def _zstd_module() -> ModuleType | None:
    """Return the module of the interface of Python 3.14; None where there is none."""
    for name in _ZSTD_MODULES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _decoder_errors() -> tuple[type[Exception], ...]:
    """Return what the decoders raise, besides OSError, on data that is damaged."""
    errors: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, EOFError)
    zstd = _zstd_module()
    return errors if zstd is None else (*errors, zstd.ZstdError)
