"""Compressed files are read whole, member by member, or end in an error that names them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.store import compressed
from data_pipeline.store.compressed import open_decompressed
from data_pipeline.store.file_kinds import FileKind, kind_of_file


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)  # type: ignore[no-any-return]


COMPRESS: dict[FileKind, Callable[[bytes], bytes]] = {
    FileKind.GZIP: gzip.compress,
    FileKind.ZSTD: zstd,
    FileKind.XZ: partial(lzma.compress, preset=0),
    FileKind.BZIP2: bz2.compress,
}
CONTENT = b"".join(f"line {number * number}\n".encode() for number in range(200_000))
KINDS = pytest.mark.parametrize("kind", COMPRESS, ids=lambda kind: kind.name.lower())


def read(path: Path) -> bytes:
    with open_decompressed(path, kind_of_file(path)) as file:
        return file.read()


@KINDS
def test_members_that_follow_each_other_are_one_content(kind: FileKind, tmp_path: Path) -> None:
    path = tmp_path / "a"
    members = [COMPRESS[kind](piece) for piece in (CONTENT, b"", b"x" * 3_000_000, b"end")]
    path.write_bytes(b"".join(members))
    assert read(path) == CONTENT + b"x" * 3_000_000 + b"end"


@pytest.mark.parametrize("num_zeros", [1, 511, 400_000])
def test_zero_bytes_around_members_of_gzip_are_padding(num_zeros: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    padding = bytes(num_zeros)
    path.write_bytes(gzip.compress(b"one") + padding + gzip.compress(b"two") + padding)
    assert read(path) == b"onetwo"
    path.write_bytes(lzma.compress(b"one") + padding + lzma.compress(b"two") + padding)
    assert read(path) == b"onetwo"


@KINDS
@pytest.mark.parametrize("kept", [0.2, 0.7, 0.999])
def test_a_file_that_is_cut_off_is_an_error(kind: FileKind, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = COMPRESS[kind](CONTENT)
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(OSError, match=r"[Tt]runcated.*/a'"):
        read(path)


@KINDS
def test_what_stands_behind_the_last_member_is_never_dropped(
    kind: FileKind, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(COMPRESS[kind](CONTENT) + b'{"text": "appended without compression"}\n')
    with pytest.raises(OSError, match=r"/a'"):
        read(path)


@KINDS
def test_a_small_file_that_stands_for_a_huge_one_fills_no_memory(
    kind: FileKind, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(COMPRESS[kind](bytes(64 * 2**20)))
    tracemalloc.start()
    num_bytes = 0
    with open_decompressed(path, kind) as file:
        while piece := file.read(1 << 16):
            num_bytes += len(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes == 64 * 2**20 and peak < 16 * 2**20


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(COMPRESS)),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 10_000),
    tail=st.binary(max_size=40),
)
def test_damaged_data_ends_in_the_content_or_in_an_error_that_names_the_file(
    kind: FileKind, flips: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(COMPRESS[kind](CONTENT[:20_000]))
    for place, mask in flips:
        data[place % len(data)] ^= mask
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(bytes(data[: max(1, len(data) - cut)]) + tail)
        failure = None
        try:
            with open_decompressed(path, kind) as file:
                file.read()
        except OSError as error:
            failure = error
        if failure is not None:
            assert failure.filename == str(path) and failure.strerror


def wide_zstd(path: Path) -> None:
    """Write a frame with a window of 2 GiB, whose size is not known beforehand."""
    program = shutil.which("zstd")
    if program is None:
        pytest.skip("needs the program zstd")
    command = [program, "-q", "--ultra", "--long=31", "-c"]
    path.write_bytes(subprocess.run(command, input=CONTENT, stdout=-1, check=True).stdout)


def test_zstd_with_a_window_of_two_gib_is_read(tmp_path: Path) -> None:
    if compressed._zstd_module() is None:
        pytest.skip("needs compression.zstd or backports.zstd")
    wide_zstd(tmp_path / "a")
    assert read(tmp_path / "a") == CONTENT


def test_zstd_with_a_wide_window_names_the_cure_where_only_pyarrow_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "_ZSTD_MODULES", ())
    wide_zstd(tmp_path / "a")
    with pytest.raises(OSError, match=r"window is larger .* Install backports.zstd .*--long=31"):
        read(tmp_path / "a")


def test_an_xz_file_that_asks_for_a_gigabyte_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**30}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    path = tmp_path / "a.xz"
    path.write_bytes(compressor.compress(b"hello") + compressor.flush())
    with (
        pytest.raises(OSError, match="its xz dictionary needs more than the 256 MiB"),
        open_decompressed(path, FileKind.XZ) as file,
    ):
        file.read()
