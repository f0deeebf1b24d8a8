"""Every document of a build is found again in its file, by line, row or number."""

from __future__ import annotations

import gzip
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.fates.steps import STEPS_FOLDER
from data_pipeline.mixture.row_origins import PieceOrigin, document_origin, row_origins
from data_pipeline.reading import units
from data_pipeline.reading.content_hashes import HASH_DTYPE, Hashes
from data_pipeline.store import provenance
from data_pipeline.store.provenance import FOLDER, PLACES_FILE, RECORDS_FILE, Provenance
from data_pipeline.text.tokenizer import decode_bytes
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.support.records import write_jsonl as write_records

TEXTS = make_texts(60, "en")


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b""
    for number, text in enumerate(texts):
        if number % 7 == 3:
            content += b"\n"  # lines without a document count as lines
        if number % 11 == 5:
            content += b"broken\n"
        record = {"text": text, "url": f"https://a.example/{number}", "n": number}
        content += json.dumps(record).encode() + b"\n"
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def sources_of(folder: Path) -> list[dict[str, Any]]:
    """Write TEXTS in every format, and return the sources that read them."""
    write_lines(folder / "lines/a/1.jsonl", TEXTS[:25])
    write_lines(folder / "lines/b.jsonl", TEXTS[25:40])
    write_lines(folder / "lines/c.jsonl.gz", TEXTS[40:])
    for number, texts in enumerate((TEXTS[:20], TEXTS[20:])):
        table = pa.table({"text": texts, "url": [f"u{text[:5]}" for text in texts]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=6)
    for number, text in enumerate(TEXTS):
        (folder / "files").mkdir(exist_ok=True)
        (folder / f"files/{number:02d}.txt").write_text(text)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return [
        {"path": "lines/**/*.jsonl*", "keep": ["url", "n", "absent"]},
        {"path": "*.parquet", "keep": ["url"]},
        {"path": "files/*.txt"},
        {"path": "saved", "format": "huggingface"},
    ]


@pytest.fixture(params=[0, 1, 2, 3], ids=["lines", "parquet", "text", "dataset"])
def mix(request: pytest.FixtureRequest, tmp_path: Path) -> MixConfig:
    return mix_of(tmp_path / "in", sources_of, request.param)


def mix_of(folder: Path, write: Any, number: int) -> MixConfig:
    folder.mkdir()
    source = write(folder)[number]
    common = {"name": "en", "language": "en", "domain": "web", "weight": 1.0}
    content = {
        "seq_len": 64,
        "seed": 7,
        "near_duplicates": 0,
        "decontaminate_tokens": 0,
        "max_reject_share": 0.5,
        "sources": [common | source],
    }
    path = folder / "mix.yaml"
    path.write_text(json.dumps(content))
    return load_mix(path)


def record_at(found: PieceOrigin) -> str:
    """Return the text at the place that is named, read without this package."""
    path = found.path
    assert path is not None
    number = found.origin.record - 1
    if path.is_dir():
        return str(datasets.load_from_disk(path)[number]["text"])
    if path.suffix == ".txt":
        assert number == 0
        return path.read_text()
    if path.suffix == ".parquet":
        assert found.row_group is not None
        group, row = found.row_group
        text = pq.ParquetFile(path).read_row_group(group)["text"][row].as_py()
        assert text == pq.read_table(path)["text"][number].as_py()
        return str(text)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return str(json.loads(content.splitlines()[number])["text"])


@pytest.mark.parametrize(
    ("unit_bytes", "most_files"),
    [(700, units.MAX_UNITS), (units.MIN_UNIT_BYTES, units.MAX_UNITS), (units.MIN_UNIT_BYTES, 0)],
    ids=["small units", "large units", "groups of files"],
)
def test_every_document_is_found_at_the_place_that_is_named(
    mix: MixConfig,
    tmp_path: Path,
    unit_bytes: int,
    most_files: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", unit_bytes)
    if most_files != units.MAX_UNITS:
        monkeypatch.setattr(units, "is_large", lambda sizes: True)
    out = tmp_path / "out"
    build(mix, out, workers=1)
    data = BuiltData.open(out)
    seen = set()
    for row in range(data.num_rows(0)):
        packed = data.read_row(0, row)
        for found in row_origins(data, 0, row, mix):
            text = record_at(found)
            seen.add(text)
            stop = found.first_slot + found.slots
            tokens = packed.input_ids[found.first_slot : stop].astype(np.uint32)
            assert decode_bytes(tokens) in text.encode()
            assert found.describe().count("\n") == len(found.origin.kept)
    assert seen == set(TEXTS)


def test_kept_fields_are_those_of_the_document(tmp_path: Path) -> None:
    mix = mix_of(tmp_path / "in", sources_of, 0)
    out = tmp_path / "out"
    build(mix, out, workers=1)
    found = document_origin(out, "en", 30, None)
    assert found.origin.file == "b.jsonl" and found.path is None
    assert dict(found.origin.kept) == {"url": "https://a.example/5", "n": "5", "absent": None}
    shown = found.describe()
    assert "url: https://a.example/5" in shown and "absent: null" in shown
    assert found.to_json()["origin"]["record"] == found.origin.record


def test_long_and_odd_values_are_kept_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.jsonl"

    def write(folder: Path) -> list[dict[str, Any]]:
        values = ["x" * 9999, "half \ud800", {"a": [1]}, None, True]
        records = [{"text": f"text {n}", "v": value} for n, value in enumerate(values)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return [{"path": "a.jsonl", "keep": ["v"]}]

    mix = mix_of(tmp_path / "in", write, 0)
    build(mix, tmp_path / "out", workers=1)
    provenance = Provenance(tmp_path / "out", "en")
    kept = [provenance.of(number).kept["v"] for number in range(5)]
    assert kept == ["x" * 2000, "half \\ud800", '{"a": [1]}', None, "true"]


def test_the_place_of_the_input_is_in_no_build(tmp_path: Path) -> None:
    builds = []
    for name in ("one", "another"):
        mix = mix_of(tmp_path / name, sources_of, 0)
        out = tmp_path / f"{name}-out"
        build(mix, out, workers=1)
        files = {}
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.name != "verified.json":  # it notes when files were written
                files[path.relative_to(out).as_posix()] = path.read_bytes()
        builds.append(files)
    assert builds[0] == builds[1]
    assert f"{FOLDER}/en/kept-00000.parquet" in builds[0]


def test_fields_are_kept_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.reading.kept_fields.STRETCH_ROWS", 4)
    mix = mix_of(tmp_path / "in", sources_of, 0)
    build(mix, tmp_path / "out", workers=1)
    file = tmp_path / "out" / FOLDER / "en" / "kept-00000.parquet"
    assert pq.ParquetFile(file).metadata.num_row_groups == 7  # 25 documents
    provenance = Provenance(tmp_path / "out", "en")
    numbers = [provenance.of(number).kept["n"] for number in range(60)]
    assert numbers == [str(n) for n in [*range(25), *range(15), *range(20)]]


def test_a_build_that_was_killed_ends_with_the_same_files(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix({"en": TEXTS}, sources={"en": {"keep": ["id"]}})
    whole = build(mix, tmp_path / "whole", workers=1)

    def killed(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.assembly.BuildManifest", killed)
        with pytest.raises(KeyboardInterrupt):
            build(mix, tmp_path / "again", workers=1)
    assert build(mix, tmp_path / "again", workers=1) == whole


@pytest.mark.parametrize("missing", ["places", "bodies"])
def test_a_part_of_an_earlier_version_without_a_file_is_made_again(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    mix = make_mix({"en": TEXTS})
    if missing == "bodies":
        records = []
        for text in TEXTS:
            question = {"role": "user", "content": text}
            records.append({"messages": [question, {"role": "assistant", "content": "Yes."}]})
        chat = {"path": str(tmp_path / "chat.jsonl"), "format": "harmony"}
        write_records(tmp_path / "chat.jsonl", records)
        mix = make_mix({"en": TEXTS}, sources={"en": chat}, seq_len=1024)

    def killed(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.assembly.BuildManifest", killed)
        with pytest.raises(KeyboardInterrupt):
            build(mix, tmp_path / "out", workers=1)
    (path,) = (tmp_path / ".out.building").rglob(f"*.{missing}")
    path.unlink()
    shutil.rmtree(tmp_path / ".out.building" / STEPS_FOLDER)  # it would save reading the file
    build(mix, tmp_path / "out", workers=1)
    assert Provenance(tmp_path / "out", "en").of(3).record == 4


def test_a_document_that_is_not_there_and_damaged_files_are_told(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(make_mix({"en": TEXTS}), out, workers=1)
    with pytest.raises(DataError, match="has 60 documents, numbered from 0, and no document 60"):
        Provenance(out, "en").of(60)
    with pytest.raises(DataError, match="does not say where the documents of source 'no'"):
        Provenance(out, "no")
    folder = out / FOLDER / "en"
    np.save(folder / PLACES_FILE, np.full(60, 2**60, np.uint64))
    with pytest.raises(DataError, match="a file number is too high"):
        Provenance(out, "en").of(0)
    (folder / "files.json").write_text("[]")
    with pytest.raises(DataError, match="not what the build wrote"):
        Provenance(out, "en")


def test_hashes_of_records_are_written_part_by_part(tmp_path: Path) -> None:
    """A map of every part at once would take a descriptor for each."""
    everything = np.arange(64, dtype="<u8").view(HASH_DTYPE)
    yielded: list[weakref.ref[Hashes]] = []

    def parts() -> Iterator[Hashes]:
        for number in range(8):
            part = everything[4 * number : 4 * number + 4].copy()
            yielded.append(weakref.ref(part))
            yield part
            assert sum(one() is not None for one in yielded) <= 2

    provenance.write_records(tmp_path, parts())
    assert np.array_equal(np.load(tmp_path / RECORDS_FILE), everything)
