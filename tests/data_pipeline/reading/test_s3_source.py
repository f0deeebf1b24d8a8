"""Sources in an object store are built as the same files on a disk are, or refused with a cure."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline.build.build import build
from data_pipeline.build.found_builds import load_built_mix
from data_pipeline.build.origin import compare, fingerprint
from data_pipeline.config.file_patterns import expand
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import ConfigError, DataError, StorageError, explain
from data_pipeline.objects import s3_store
from data_pipeline.objects.object_paths import ObjectPath, find_objects
from data_pipeline.reading import input_files, units
from data_pipeline.reading.input_files import HashNotes
from data_pipeline.reading.sources import read_documents
from data_pipeline.store.compressed import _zstd_module
from data_pipeline.store.provenance import FILES_FILE, FOLDER
from data_pipeline.store.verification import NOTE_FILE
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import make_texts, write_jsonl
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, FakeS3, fake_s3

TEXTS = make_texts(60, "en")
PATTERNS = {
    "lines": ["lines/**/*.jsonl*"],
    "tables": ["*.parquet"],
    "texts": ["files/*.txt", "files/last.md"],
}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    forget_stores()
    with fake_s3(monkeypatch) as server:
        yield server
    forget_stores()


def forget_stores() -> None:
    """Let the next test begin as a process does."""
    s3_store._store_of.cache_clear()
    s3_store._OUT_OF_REACH.clear()
    s3_store._SEEN.clear()


def write_corpus(folder: Path) -> Path:
    """Write TEXTS in every format that has files."""
    lines = []
    for number, text in enumerate(TEXTS):
        lines.append(json.dumps({"text": text, "url": f"https://a.example/{number}"}).encode())
    packed = {
        "a/1.jsonl": b"\n".join(lines[:30]),
        "b.jsonl.gz": gzip.compress(b"\n".join(lines[30:40]), mtime=0),
        "c.jsonl.xz": lzma.compress(b"\n".join(lines[40:45])),
        "d.jsonl.bz2": bz2.compress(b"\n".join(lines[45:50])),
    }
    zstd = _zstd_module()
    if zstd is not None:
        packed["e.jsonl.zst"] = zstd.compress(b"\n".join(lines[50:]))
    for name, content in packed.items():
        path = folder / "lines" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for number, texts in enumerate((make_texts(20, "p"), make_texts(15, "q"))):
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=6)
    (folder / "files").mkdir()
    for number, text in enumerate(make_texts(8, "t")):
        (folder / f"files/{number:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "files/last.md").write_text("# The last one\n", encoding="utf-8")
    return folder


def upload(s3: FakeS3, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.put("corpus", f"v1/{path.relative_to(folder)}", path.read_bytes())


def write_mix(file: Path, base: str, patterns: dict[str, list[str]], **keys: Any) -> Path:
    sources = []
    for name, of_source in patterns.items():
        source = {"name": name, "language": "en", "domain": "web", "weight": 1 / len(patterns)}
        source["path"] = [f"{base}/{pattern}" for pattern in of_source]
        sources.append({**source, "held_out_share": 0.1, **keys})
    content = {
        "seq_len": 64,
        "seed": 7,
        "near_duplicates": 0,
        "decontaminate_tokens": 0,
        "sources": sources,
    }
    content["guard"] = {"min_documents": 1, "min_tokens": 1}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def mix_of(tmp_path: Path, base: str = "s3://corpus/v1", **keys: Any) -> MixConfig:
    return load_mix(write_mix(tmp_path / "mix.yaml", base, PATTERNS, **keys))


def contents_of(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NOTE_FILE and not path.name.startswith("."):
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_build_of_objects_is_that_of_the_same_files(
    tmp_path: Path, s3: FakeS3, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers == 1:  # worker processes do not see it
        monkeypatch.setattr(units, "MIN_UNIT_BYTES", 2000)
    folder = write_corpus(tmp_path / "disk")
    upload(s3, folder)
    of_objects = mix_of(tmp_path)
    of_files = mix_of(tmp_path, str(folder))
    assert fingerprint(of_objects) == fingerprint(of_files)
    manifest = build(of_objects, tmp_path / "from_s3", workers=workers, progress=False)
    assert manifest == build(of_files, tmp_path / "from_disk", workers=1, progress=False)
    assert contents_of(tmp_path / "from_s3") == contents_of(tmp_path / "from_disk")
    names = (tmp_path / "from_s3" / FOLDER / "lines" / FILES_FILE).read_text(encoding="utf-8")
    assert "a/1.jsonl" in names and "corpus" not in names
    assert ("1.jsonl", s3.size_of("v1/lines/a/1.jsonl")) == manifest.inputs["lines"].listed[0][:2]
    assert all(request.is_signed for request in s3.requests)


@pytest.mark.parametrize("name", ["big.jsonl", "big.parquet"])
def test_a_unit_reads_its_stretch_of_an_object_alone(
    tmp_path: Path, s3: FakeS3, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 200_000)
    texts = [random.Random(number).randbytes(2000).hex() for number in range(500)]
    path = tmp_path / name
    if path.suffix == ".parquet":
        table = pa.table({"text": texts, "other": texts[::-1]})
        pq.write_table(table, path, row_group_size=25, compression="none", use_dictionary=False)
    else:
        write_jsonl(path, texts)
    content = path.read_bytes()
    s3.put("corpus", name, content)
    mix = load_mix(write_mix(tmp_path / "mix.yaml", "s3://corpus", {"one": [name]}))
    all_units = units.split_into_units(mix.sources[0])
    assert len(all_units) >= 10
    s3.requests.clear()
    read = list(read_documents(mix.sources[0], all_units[4], Tally()))
    assert {document.text for document in read} < set(texts)
    num_bytes = 0
    for request in s3.reads():
        first, last = request.range.removeprefix("bytes=").split("-")
        num_bytes += int(last) - int(first) + 1
    assert 200_000 < num_bytes < len(content) / 2


def test_the_hashes_of_objects_are_noted_by_their_version(tmp_path: Path, s3: FakeS3) -> None:
    upload(s3, write_corpus(tmp_path / "disk"))
    mix = mix_of(tmp_path)
    before = fingerprint(mix, notes=HashNotes(tmp_path / "notes"))
    forget_process()
    s3.requests.clear()
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) == before
    assert not s3.reads()
    changed = s3.buckets["corpus"]["v1/files/03.txt"].replace(b"t", b"u")
    s3.put("corpus", "v1/files/03.txt", changed)  # of the same size, within the same second
    forget_process()
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) != before
    assert {request.path for request in s3.reads()} == {"corpus/v1/files/03.txt"}


def forget_process() -> None:
    input_files._HASHED_HERE.clear()
    forget_stores()


@pytest.mark.parametrize(
    ("is_looked_at", "told"),
    [
        (False, "cannot be read: the object was written anew since the bucket was listed"),
        (True, "changed while the build was at work"),
    ],
)
def test_an_object_that_is_written_anew_during_a_build_is_refused(
    tmp_path: Path, s3: FakeS3, is_looked_at: bool, told: str
) -> None:
    upload(s3, write_corpus(tmp_path / "disk"))
    old = s3.buckets["corpus"]["v1/lines/a/1.jsonl"]
    s3.put("corpus", "v1/lines/a/1.jsonl", old, modified=1.75e9 + is_looked_at)
    mix = mix_of(tmp_path)
    fingerprint(mix)
    if is_looked_at:
        units.split_into_units(mix.sources[0])

    def rewrite(key: str) -> None:
        if key == "corpus/v1/lines/a/1.jsonl":
            s3.put("corpus", "v1/lines/a/1.jsonl", old.replace(b"river", b"stone"))

    s3.before_read = rewrite
    with pytest.raises(DataError, match=f"s3://corpus/v1/lines/a/1.jsonl: {told}"):
        build(mix, tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize("source", [0, 1, 2])
@pytest.mark.parametrize(
    ("refusal", "error", "told"),
    [
        ((403, "AccessDenied"), DataError, "cannot be read: the store refuses the credentials"),
        ((503, "SlowDown"), StorageError, "does not answer as it should"),
    ],
)
def test_a_store_that_fails_while_it_is_read_is_told_as_such(
    tmp_path: Path,
    s3: FakeS3,
    source: int,
    refusal: tuple[int, str],
    error: type[Exception],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_store, "ATTEMPTS", 1)
    upload(s3, write_corpus(tmp_path / "disk"))
    config = mix_of(tmp_path).sources[source]
    (unit, *_) = units.split_into_units(config)

    def refuse(key: str) -> None:
        del key
        s3.refusal = refusal

    s3.before_read = refuse
    with pytest.raises(error) as caught:
        list(read_documents(config, unit, Tally()))
    assert told in str(caught.value) and "s3://corpus/v1/" in str(caught.value)


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((403, "AccessDenied"), "refuses the credentials (ACCESS_DENIED)"),
        ((403, "InvalidAccessKeyId"), "refuses the credentials (INVALID_ACCESS_KEY_ID)"),
    ],
)
def test_a_refusal_says_what_is_needed_and_shows_no_credential(
    tmp_path: Path, s3: FakeS3, refusal: tuple[int, str], told: str
) -> None:
    s3.put("corpus", "v1/a.jsonl", b"{}")
    s3.refusal = refusal
    with pytest.raises(ConfigError) as caught:
        mix_of(tmp_path)
    assert told in str(caught.value) and "s3:GetObject" in str(caught.value)
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in str(caught.value)


def test_missing_credentials_are_told_as_such(
    tmp_path: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3.refusal = (403, "AccessDenied")
    with pytest.raises(ConfigError, match=r"names no credentials\. Set AWS_ACCESS_KEY_ID"):
        mix_of(tmp_path)


def test_a_bucket_that_is_not_there_is_named(tmp_path: Path, s3: FakeS3) -> None:
    for base in ("s3://none/v1", "s3://none"):
        with pytest.raises(ConfigError, match="there is no bucket 'none' in this store"):
            mix_of(tmp_path, base)


def test_a_store_that_does_not_answer_is_an_error_of_storage(
    tmp_path: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "ATTEMPTS", 2)
    s3.refusal = (503, "SlowDown")
    with pytest.raises(StorageError) as caught:
        mix_of(tmp_path)
    num_requests = len(s3.requests)
    assert 2 <= num_requests <= 4
    message, code = explain(caught.value) or ("", 0)
    assert code == 74
    assert "does not answer as it should" in message and "AWS_ENDPOINT_URL" in message
    with pytest.raises(StorageError):
        mix_of(tmp_path)
    assert len(s3.requests) == num_requests


def test_a_store_that_falls_silent_is_given_up(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "ATTEMPTS", 1)
    monkeypatch.setattr(s3_store, "_SILENT_SECONDS", 1.0)
    s3.put("corpus", "a.jsonl", b"{}")
    (path,) = find_objects("s3://corpus/a.jsonl")
    is_over = threading.Event()

    def wait(key: str) -> None:
        del key
        is_over.wait(60)

    s3.before_read = wait
    try:
        with path.open("rb") as file, pytest.raises(StorageError, match="does not answer"):
            file.read()
        assert not is_over.is_set()
    finally:
        is_over.set()


def test_a_build_is_trained_on_where_its_store_is_out_of_reach(
    tmp_path: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, write_corpus(tmp_path / "disk"))
    mix_file = write_mix(tmp_path / "mix.yaml", "s3://corpus/v1", {"texts": PATTERNS["texts"]})
    manifest = build(load_mix(mix_file), tmp_path / "out", workers=1, progress=False)
    for refusal in ((403, "AccessDenied"), (501, "NotImplemented")):
        forget_stores()
        s3.refusal = refusal
        mix = load_built_mix(mix_file, tmp_path / "out")
        found = compare(manifest, mix, read_contents=False)
        assert found.absent == ("texts",) and not found.differences


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("s3://AKIA:secret@corpus", "with a user or port in it"),
        ("s3://corpus//v1", "has the part '' between two slashes"),
        ("s3://corpus/../v1", "has the part '..' between two slashes"),
        ("s3://corpus/none", "which matches no object"),
        ("s3://", "which is no name of a bucket"),
    ],
)
def test_an_address_that_names_no_object_is_refused(
    tmp_path: Path, s3: FakeS3, base: str, told: str
) -> None:
    s3.put("corpus", "v1/a.jsonl", b"{}")
    with pytest.raises(ConfigError) as caught:
        mix_of(tmp_path, base)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_a_format_cannot_read_from_a_store_is_refused(tmp_path: Path, s3: FakeS3) -> None:
    s3.put("corpus", "v1/a.jsonl", b"{}")
    one = {"one": ["v1/a.jsonl"]}
    for keys, told in (
        ({"path": "s3://corpus/v1", "format": "build"}, "reads a folder of a disk. Copy it here"),
        ({"path": "s3://corpus/v1/a.jsonl", "kind": "self_replay"}, "is self_replay, but"),
        ({"path": ["s3://corpus/v1/a.jsonl", "b.jsonl"]}, "names both files and objects"),
        ({"path": ["s3://corpus/v1/*.jsonl", "s3://corpus/v1/a.jsonl"]}, "names s3://corpus/v1/a"),
    ):
        path = write_mix(tmp_path / "mix.yaml", "s3://corpus", one, **keys)
        with pytest.raises(ConfigError) as caught:
            load_mix(path)
        assert told in str(caught.value)


KEYS = [
    "a/x.jsonl",
    "a/y.txt",
    "a/.h.jsonl",
    "a/b/z.jsonl",
    "a/b/c/w.jsonl",
    ".d/v.jsonl",
    "q[1].jsonl",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "a/*.jsonl",
        "a/**/*.jsonl",
        "**",
        "**/*.jsonl",
        "*/*/*",
        "a/?.*",
        "a/.*",
        "q[1].jsonl",
        "q[[]1].jsonl",
    ],
)
def test_patterns_match_objects_as_they_match_files(
    tmp_path: Path, s3: FakeS3, pattern: str
) -> None:
    for key in KEYS:
        s3.put("corpus", key, b"x")
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    of_files = [str(path.relative_to(tmp_path)) for path in expand(f"{tmp_path}/{pattern}")]
    of_objects = [
        path.key.removeprefix("corpus/") for path in find_objects(f"s3://corpus/{pattern}")
    ]
    assert of_objects == of_files and of_files


def test_a_path_of_an_object_goes_to_another_process_with_its_version(s3: FakeS3) -> None:
    s3.put("corpus", "a.jsonl", b"one")
    (path,) = find_objects("s3://corpus/a.jsonl")
    s3.put("corpus", "a.jsonl", b"two")
    there = pickle.loads(pickle.dumps(path))
    assert isinstance(there, ObjectPath) and there.version == path.version
    with pytest.raises(OSError, match="written anew"):
        there.open("rb")
    assert there.parent / "a.jsonl" == path and str(there) == "s3://corpus/a.jsonl"
