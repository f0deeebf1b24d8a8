"""The first bytes of a file tell what it is, whatever it is called."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.store.file_kinds import (
    FileKind,
    describe_head,
    kind_of,
    kind_of_file,
    kind_of_text,
)
from data_pipeline.store.text_files import text_layers

TABLE = pa.table({"text": ["a", "b"]})
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
)
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def written(write: object, *arguments: object) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments)  # type: ignore[operator]  # any function that writes to a file
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", "{}")
    return buffer.getvalue()


def stream_bytes() -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, TABLE.schema) as stream:
        stream.write_table(TABLE)
    return buffer.getvalue()


def file_bytes() -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, TABLE.schema) as file:
        file.write_table(TABLE)
    return buffer.getvalue()


SAMPLES = {
    FileKind.LFS_POINTER: LFS_POINTER,
    FileKind.ANNEX_POINTER: b"/annex/objects/SHA256E-s1--abc.jsonl\n",
    FileKind.HTML: HTML,
    FileKind.XML: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    FileKind.GZIP: gzip.compress(b"a"),
    FileKind.ZSTD: pa.compress(b"a", "zstd", asbytes=True),
    FileKind.XZ: lzma.compress(b"a"),
    FileKind.BZIP2: bz2.compress(b"a"),
    FileKind.LZ4: pa.compress(b"a", "lz4", asbytes=True),
    FileKind.ZIP: zip_bytes(),
    FileKind.TAR: tar_bytes(),
    FileKind.PARQUET: written(lambda file: pq.write_table(TABLE, file)),
    FileKind.ARROW_FILE: file_bytes(),
    FileKind.ARROW_STREAM: stream_bytes(),
    FileKind.ORC: written(lambda file: pa.orc.write_table(TABLE, file)),
    FileKind.SAFETENSORS: safetensors_bytes(),
    FileKind.PICKLE: pickle.dumps({"a": [1]}, protocol=4),
    FileKind.NUMPY: written(lambda file: np.save(file, np.zeros(3))),
    FileKind.PDF: b"%PDF-1.7\n",
    FileKind.ZEROS: bytes(100),
    FileKind.TEXT: b'{"text": "a"}\n',
}


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.name.lower())
def test_kind_is_told_from_the_first_bytes(kind: FileKind, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(SAMPLES[kind])
    assert kind_of_file(path) is kind
    assert kind_of_text(SAMPLES[kind]) is kind, "also where text is expected"
    assert kind is FileKind.TEXT or kind.cure


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a",
        b"version 1 of the text",
        b"PKZIP was written in 1989",
        b"BZh is not a word",
        b"<p>a paragraph</p>",
        b"ORCs are no files",
        b"\xe6\xb0\xb4\xe3\x81\xae\xe9\x9f\xb3",
        "\u6c34\u306e\u97f3".encode("shift_jis"),
        "\u6c34\u306e\u97f3".encode("utf-16"),
    ],
)
def test_text_is_taken_for_nothing_else(text: bytes) -> None:
    assert kind_of(text) is FileKind.TEXT


@pytest.mark.parametrize(
    "text",
    [
        b"PARENTS AND CHILDREN\n",
        b"PAR1 is a magic",
        b"GGUF: a format",
        b"FEA1\n",
        b"ORC\n\nIn Mordor",
    ],
)
def test_text_may_begin_with_the_letters_of_another_kind(text: bytes, tmp_path: Path) -> None:
    assert kind_of_text(text) is FileKind.TEXT
    path = tmp_path / "p.txt"
    path.write_bytes(text)
    assert text_layers(path).content is FileKind.TEXT
    path = tmp_path / "p.txt.gz"
    path.write_bytes(gzip.compress(text))
    assert text_layers(path).content is FileKind.TEXT
    path = tmp_path / "p16.txt"
    path.write_bytes(text.decode().encode("utf-16"))
    assert text_layers(path).content is FileKind.TEXT
    path = tmp_path / "table.txt.gz"
    path.write_bytes(gzip.compress(SAMPLES[FileKind.PARQUET]))
    assert text_layers(path).content is FileKind.PARQUET


@given(st.binary(max_size=600))
def test_any_bytes_have_a_kind(head: bytes) -> None:
    assert kind_of(head) in FileKind


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=300))
def test_text_without_a_mark_of_its_own_stays_text(text: str) -> None:
    if kind_of(text.encode("utf-8")) is not FileKind.TEXT:
        assert text.lstrip().startswith(("<", "%PDF-", "PAR", "FEA1", "version https://", "/annex"))


def test_what_is_shown_of_an_unknown_file_is_how_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"text " * 100)
    assert describe_head(path) == "something that begins with b'text text text text text'"
    path.write_bytes(LFS_POINTER)
    assert describe_head(path) == "a Git LFS pointer in place of the file"
    assert describe_head(tmp_path / "missing") == ""
