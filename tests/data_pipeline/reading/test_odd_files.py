"""Files are read as what they are, or told in one sentence with the cure (case D3)."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import ConfigError, CptError, DataError
from data_pipeline.reading import units
from data_pipeline.reading.sources import read_texts
from data_pipeline.store.text_files import _LineEnds
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import make_texts, write_jsonl

TEXTS = make_texts(50, "t")
MARK = codecs.BOM_UTF8


def read(*paths: Path, **keys: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    values: dict[str, Any] = {"name": "s", "language": "en", "domain": "web", "weight": 1.0} | keys
    source = SourceConfig(path=tuple(map(str, paths)), **values)
    return list(read_texts(source, tally)), tally


def lines(texts: list[str], end: str = "\n") -> str:
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    return "".join(record + end for record in records)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)  # type: ignore[no-any-return]


COMPRESS = {"gzip": gzip.compress, "zstd": zstd, "xz": lzma.compress, "bz2": bz2.compress}
BY_COMPRESSION = pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)


@BY_COMPRESSION
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_compressed_content_is_read_under_any_name(
    compress: Callable[[bytes], bytes], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(compress(lines(TEXTS).encode()))
    assert read(path)[0] == TEXTS
    assert read(path, format="jsonl")[0] == TEXTS


@BY_COMPRESSION
def test_compressed_text_files_are_read_under_any_name(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(compress(b"inside"))
    (tmp_path / "b.txt.gz").write_bytes(b"plain")
    assert read(tmp_path / "a.txt", tmp_path / "b.txt.gz")[0] == ["inside", "plain"]


def test_plain_text_named_gz_is_read_and_cut_into_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    source = SourceConfig(name="s", language="en", domain="web", weight=1.0, path=str(path))
    assert len(units.split_into_units(source)) > 1 and read(path)[0] == TEXTS


def test_padded_gzip_of_several_members_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    half = lines(TEXTS[:25]).encode(), lines(TEXTS[25:]).encode()
    path.write_bytes(gzip.compress(half[0]) + bytes(512) + gzip.compress(half[1]) + bytes(512))
    assert read(path)[0] == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "jsonl.gz"])
def test_utf_16_and_utf_32_are_read(
    encoding: str, order: str, mark: bool, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    texts = TEXTS[:5] if "jsonl" in suffix else ["words and \u6c34\n"]
    content = lines(texts) if "jsonl" in suffix else texts[0]
    data = (("\ufeff" if mark else "") + content).encode(f"{encoding}-{order}")
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found, tally = read(path)
    assert found == texts and not tally.rejects
    assert tally.notes[f"file in {encoding.upper()}, read as UTF-8"] == 1
    assert tally.notes["byte order mark"] == mark


def test_what_is_no_character_in_utf_16_costs_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = lines(["one", "two", "three"]).encode("utf-16-le")
    broken = data.replace("two".encode("utf-16-le"), b"t\0\x00\xd8o\0")
    path.write_bytes(broken + b"\0")
    found, tally = read(path)
    assert found == ["one", "three"]
    assert tally.places["invalid UTF-8"][0].line == 2


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_cr_line_ends_are_line_ends(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    texts = TEXTS if suffix == "jsonl" else ["one\ntwo\n\nthree"]
    content = lines(texts, "\r") if suffix == "jsonl" else texts[0].replace("\n", "\r")
    path.write_bytes(content.encode())
    found, tally = read(path)
    assert found == texts and dict(tally.notes) == {"file with CR line ends, read as LF": 1}


def test_a_first_line_longer_than_what_is_looked_at_keeps_its_cr(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["x" * 200_000, "short"]
    path.write_bytes(lines(texts, "\r").encode())
    assert read(path)[0] == texts
    path.write_bytes(lines(texts, "\r\n").encode())
    assert read(path)[0] == texts


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["\r", "\n", "\r\n", "a", "\u6c34"]), max_size=30),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_line_ends_are_the_same_wherever_a_piece_ends(pieces: list[str], sizes: list[int]) -> None:
    content = "".join(pieces).encode()
    stream = _LineEnds(io.BytesIO(content))
    found = b""
    number = 0
    while piece := stream.read(sizes[number % len(sizes)]):
        found += piece
        number += 1
    assert found == content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def test_byte_order_marks_are_taken_off_wherever_files_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    members = [gzip.compress(MARK + lines([text]).encode()) for text in TEXTS[:3]]
    path.write_bytes(b"".join(members))
    found, tally = read(path)
    assert found == TEXTS[:3] and dict(tally.notes) == {"byte order mark": 3}
    path = tmp_path / "b.jsonl"
    path.write_bytes(MARK + MARK + lines(TEXTS[:2]).encode() + MARK + lines(TEXTS[2:4]).encode())
    assert read(path)[0] == TEXTS[:4]
    text = tmp_path / "c.txt"
    text.write_bytes(MARK + b"one\n" + MARK + b"two\n")
    found, tally = read(text)
    assert found == ["one\ntwo\n"] and tally.notes["byte order mark inside a file"] == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"


def words_of(value: str | bytes) -> str:
    """Name a case by what is said of it: compressed content has the time in it."""
    return "" if isinstance(value, bytes) else value[:40]


PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a Git LFS pointer in place of the file, not JSONL .*git lfs pull"),
        (gzip.compress(POINTER), r"is gzip data with a Git LFS pointer .*git lfs pull"),
        (PAGE, r"is an HTML page, not JSONL .*fetch it again"),
        (PAGE.decode().encode("utf-16"), r"is an HTML page, not JSONL .*fetch it again"),
        (b"<?xml version='1.0'?><Error/>", r"is an XML document, not JSONL"),
        (bytes(5000), r"is zero bytes where .* not JSONL .*fetch it again"),
        (gzip.compress(gzip.compress(b"{}")), r"is gzip data with gzip data, .*Decompress it"),
        (b"PK\x03\x04" + bytes(100), r"is a ZIP archive .*, not JSONL .*Unpack it"),
        (b'[\n  {"text": "a"},\n', r"is one JSON array, .*Convert it: jq -c '.\[\]'"),
        (MARK + b'[{"text": "a"}]', r"is one JSON array"),
        (
            b'{\n  "text": "a"\n}\n{\n',
            r"is JSON with records over several .*Convert it: jq -c \.",
        ),
        (gzip.compress(b""), r"empty file: holds nothing once it is decompressed .*fetch it again"),
        (MARK, r"empty file: holds nothing"),
        (gzip.compress(b"x" * 5000)[:20], r"cannot be read: truncated.*Fetch it again"),
        (b"\x1f\x8b" + b"x" * 50, r"cannot be read: its compressed data is damaged.*Fetch it"),
    ],
    ids=words_of,
)
@pytest.mark.parametrize("form", ["auto", "jsonl", "harmony"])
def test_a_file_that_is_no_jsonl_is_told_with_the_cure(
    content: bytes, message: str, form: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a.jsonl: {message}"):
        read(path, format=form)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a Git LFS pointer in place of the file, not a Parquet file .*git lfs pull"),
        (PAGE, r"is an HTML page, not a Parquet file .*fetch it again"),
        (b'{"text": "a"}\n', r"begins with b'\{\"text\": .*set the format that it has"),
        (gzip.compress(b"PAR1"), r"is gzip data, not a Parquet file .*gzip -dc"),
        (b"ARROW1\x00\x00" + bytes(50), r"is an Arrow file .*format: huggingface"),
        (b"PARE" + bytes(50), r"is an encrypted Parquet file"),
    ],
    ids=words_of,
)
def test_a_file_that_is_no_parquet_is_told_with_the_cure(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a.parquet: .*{message}"):
        read(path)


def test_parquet_under_another_name_is_read_unless_the_mix_says_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pq.write_table(pa.table({"text": TEXTS}), path)
    assert read(path)[0] == TEXTS
    with pytest.raises(DataError, match=r"is a Parquet file, not JSONL .*Set format: parquet"):
        read(path, format="jsonl")


def test_a_text_file_that_is_no_text_is_a_reject_with_its_reason(tmp_path: Path) -> None:
    names = ["a.txt", "b.txt", "c.txt", "d.html", "e.md", "f.txt"]
    contents = [POINTER, PAGE, b"%PDF-1.7 ", PAGE, b"fine", b"PARENTS AND CHILDREN"]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(content)
    found, tally = read(*(tmp_path / name for name in names), format="text")
    assert found == [PAGE.decode(), "fine", "PARENTS AND CHILDREN"]
    assert dict(tally.rejects) == {
        "is a Git LFS pointer in place of the file, not text": 1,
        "is an HTML page, not text": 1,
        "is a PDF document, not text": 1,
    }


@pytest.mark.parametrize("pattern", ["a.jsonl", "*.jsonl"])
def test_a_link_to_nothing_is_refused_when_the_mix_is_read(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    (tmp_path / "mix.yaml").write_text(
        "seq_len: 64\nseed: 1\nsources:\n"
        f"  - {{name: a, language: en, domain: web, path: '{pattern}', weight: 1.0}}\n"
    )
    with pytest.raises(ConfigError, match=r"a.jsonl is a link to .*0123, which does not exist"):
        load_mix(tmp_path / "mix.yaml")


REPEATED = b'{"text": "first", "text": "second"}\n'


@pytest.mark.parametrize(
    ("line", "texts", "rejects", "notes"),
    [
        (REPEATED, [], {"key 'text' given twice": 1}, 0),
        (b'{"text": "a", "id": 1, "id": 2}\n', ["a"], {}, 1),
        (b'{"text": "a", "meta": {"text": 1, "text": 2}}\n', ["a"], {}, 1),
        (b'{"te\\u0078t": "a", "text": "b"}\n', [], {"key 'text' given twice": 1}, 0),
    ],
)
def test_a_key_given_twice_is_counted(
    line: bytes, texts: list[str], rejects: dict[str, int], notes: int, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    found, tally = read(tmp_path / "a.jsonl")
    assert found == texts and dict(tally.rejects) == rejects
    assert tally.notes["record with a key given twice, not one that is read"] == notes


def test_a_key_given_twice_anywhere_in_a_conversation_rejects_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}, '
        b'{"role": "assistant", "content": "c"}]}\n'
    )
    found, tally = read(tmp_path / "a.jsonl", format="harmony")
    assert found == [] and dict(tally.rejects) == {"key 'content' given twice": 1}


CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=100).map(lambda tail: b"PAR1" + tail + b"PAR1"),
    st.binary(max_size=100).map(lambda tail: b"\x1f\x8b\x08" + tail),
    st.binary(max_size=100).map(gzip.compress),
    st.text(max_size=100).map(lambda text: text.encode("utf-16", "surrogatepass")),
    st.text(max_size=100).map(lambda text: lines([text]).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=300, deadline=None)
@given(content=CONTENTS, suffix=st.sampled_from(["jsonl", "txt", "parquet", "jsonl.gz", "txt.xz"]))
def test_any_file_gives_texts_or_a_message_with_a_code(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_bytes(content)
        tally = Tally()
        failure = None
        try:
            found, tally = read(path)
        except CptError as error:
            failure = error
        if failure is not None:
            assert failure.exit_code == 65 and str(path) in str(failure)
        else:
            assert len(found) == tally.accepted and all(map(str.strip, found))
