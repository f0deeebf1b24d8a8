"""A row is what the model sees: inputs, labels, positions and boundaries agree."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow
from data_pipeline.errors import DataError
from data_pipeline.store.files import sha256_of
from data_pipeline.store.manifest import FORMAT_VERSION, BuildManifest, FileEntry, SourceEntry
from data_pipeline.store.packing import ARRAY_NAMES, Segments, pack
from data_pipeline.store.row_files import (
    DERIVED_FILES,
    SHARD_DOCUMENTS_FILE,
    save_array,
    save_row_tokens,
)
from data_pipeline.store.shards import HEADER_BYTES, LossMask, Shards, ShardWriter
from data_pipeline.text.tokenizer import END_OF_TEXT, Tokens
from tests.data_pipeline.inputs import MakeMix, make_texts

SEQ_LEN = 32


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    texts = {
        "ja_a": make_texts(30, "a"),
        "ja_b": make_texts(20, "bb"),
        "en": make_texts(40, "ccc", 8),
    }
    guard = {"domains": [{"name": "japanese", "language": "ja", "sources": ["ja_a", "ja_b"]}]}
    return make_mix(texts, seq_len=SEQ_LEN, held_out_share=0.3, guard=guard)


@pytest.fixture
def built(mix: MixConfig, tmp_path: Path) -> BuiltData:
    build(mix, tmp_path / "out", progress=False)
    return BuiltData.open(tmp_path / "out")


def all_rows(built: BuiltData) -> list[PackedRow]:
    rows = []
    for source in range(len(built.source_names)):
        for row in range(built.num_rows(source)):
            rows.append(built.read_row(source, row))
    for domain in built.held_out:
        for row in range(domain.num_rows):
            rows.append(domain.read_row(row))
    return rows


def test_rows_have_the_promised_shape(built: BuiltData) -> None:
    for row in all_rows(built):
        for values in (row.input_ids, row.labels, row.position_ids):
            assert values.shape == (SEQ_LEN,) and values.dtype == np.int64
        assert row.bounds[0] == 0
        assert row.bounds[-1] == SEQ_LEN
        assert row.bounds == sorted(set(row.bounds))
        padded = int(row.labels[-1] == IGNORED_LABEL)
        assert len(row.bounds) == len(row.documents) + 1 + padded


def test_labels_are_the_next_token_and_never_cross_a_document(built: BuiltData) -> None:
    for row in all_rows(built):
        for begin, end in zip(row.bounds[: len(row.documents)], row.bounds[1:], strict=False):
            assert np.array_equal(row.labels[begin : end - 1], row.input_ids[begin + 1 : end])
            assert not (row.labels[begin : end - 1] == END_OF_TEXT).any()


def test_end_of_text_is_a_label_and_an_input_only_in_padding(built: BuiltData) -> None:
    for row in all_rows(built):
        padding = row.labels == IGNORED_LABEL
        start_of_padding = row.bounds[len(row.documents)]
        assert np.array_equal(row.input_ids == END_OF_TEXT, padding)
        assert not padding[:start_of_padding].any()
        assert padding[start_of_padding:].all()


def test_positions_restart_at_every_document_and_at_the_padding(built: BuiltData) -> None:
    for row in all_rows(built):
        counted = np.concatenate([np.arange(length) for length in np.diff(row.bounds)])
        assert np.array_equal(row.position_ids, counted)


def test_predicted_tokens_of_a_row_are_its_labels(built: BuiltData) -> None:
    for source in range(len(built.source_names)):
        counted = []
        for row in range(built.num_rows(source)):
            labels = built.read_row(source, row).labels
            counted.append(np.count_nonzero(labels != IGNORED_LABEL))
        assert built.row_tokens(source).tolist() == counted


def test_a_row_out_of_range_is_an_index_error(built: BuiltData) -> None:
    for row in (-1, built.num_rows(0)):
        with pytest.raises(IndexError, match="source 'ja_a' has"):
            built.read_row(0, row)
    with pytest.raises(IndexError, match="held-out set 'japanese' has"):
        built.held_out[0].read_row(built.held_out[0].num_rows)


def test_held_out_documents_are_numbered_through_their_domain(built: BuiltData) -> None:
    (domain,) = built.held_out
    assert (domain.name, domain.language, domain.sources) == ("japanese", "ja", ("ja_a", "ja_b"))
    tokens = np.zeros(domain.num_documents, dtype=np.int64)
    for number in range(domain.num_rows):
        row = domain.read_row(number)
        np.add.at(tokens, row.documents, np.diff(row.bounds)[: len(row.documents)])
    entries = built.manifest.sources[:2]
    assert domain.num_documents == sum(entry.held_out_documents for entry in entries)
    assert (tokens >= 1).all()
    assert (domain.document_bytes >= tokens).all()


def test_held_out_documents_can_be_packed_alone(built: BuiltData) -> None:
    """Tokens are those of the build's own rows, whatever else lies in them."""
    (domain,) = built.held_out
    in_build: dict[int, list[int]] = {}
    pieces = [domain.read_row(number) for number in range(domain.num_rows)]
    for row in pieces:
        for index, document in enumerate(row.documents.tolist()):
            span = slice(row.bounds[index], row.bounds[index + 1])
            in_build.setdefault(document, []).extend(row.labels[span].tolist())
    chosen = np.array([domain.num_documents - 1, 0])
    packed = domain.pack(chosen)
    alone: dict[int, list[int]] = {}
    for number in range(packed.num_rows):
        row = packed.read_row(number)
        assert row.input_ids.shape == (SEQ_LEN,)
        for index, position in enumerate(row.documents.tolist()):
            span = slice(row.bounds[index], row.bounds[index + 1])
            document = int(chosen[position])
            alone.setdefault(document, []).extend(row.labels[span].tolist())
    assert alone.keys() == set(chosen.tolist())
    for document, labels in alone.items():
        assert sorted(labels) == sorted(in_build[document])
        assert len(labels) == domain.document_tokens[document] - 1


def test_labels_and_guard_domains_of_the_present_mix_replace_those_of_the_build(
    mix: MixConfig, built: BuiltData
) -> None:
    domain = GuardDomain(name="english", language="en", sources=("en",))
    sources = tuple(dataclasses.replace(source, domain="books") for source in mix.sources)
    guard = dataclasses.replace(mix.guard, domains=(domain,))
    changed = dataclasses.replace(mix, sources=sources, guard=guard)
    again = BuiltData.open(built.directory, mix=changed)
    assert [held.name for held in again.held_out] == ["english"]
    assert again.domains == ("books",) * 3
    with pytest.raises(DataError, match="built for seq_len 32"):
        BuiltData.open(built.directory, mix=dataclasses.replace(mix, seq_len=64))


def test_rows_that_leave_their_document_are_refused_even_without_hashing(built: BuiltData) -> None:
    path = built.directory / "en" / "train" / "piece_start.npy"
    values = np.load(path)
    values[0] += 1000
    np.save(path, values)
    with pytest.raises(DataError, match="row arrays do not fit the documents"):
        BuiltData.open(built.directory, verify=False)


def test_rows_whose_end_wraps_around_are_refused(built: BuiltData) -> None:
    path = built.directory / "en" / "train" / "piece_start.npy"
    values = np.load(path)
    values[0] = 2**63 - 1
    np.save(path, values)
    with pytest.raises(DataError, match="row arrays do not fit the documents"):
        BuiltData.open(built.directory, verify=False)


def test_slots_of_a_row_are_those_of_the_whole_row(built: BuiltData) -> None:
    for source in range(len(built.source_names)):
        for number in range(built.num_rows(source)):
            whole = built.read_row(source, number)
            for first in range(0, SEQ_LEN, 8):
                slots = slice(first, first + 8)
                part = built.read_row(source, number, slots)
                for name in ("input_ids", "labels", "position_ids"):
                    assert np.array_equal(getattr(part, name), getattr(whole, name)[slots])
                assert part.bounds == whole.bounds
                assert np.array_equal(part.documents, whole.documents)


def test_ranks_that_share_a_row_read_no_more_tokens_than_one_that_reads_it_all(
    built: BuiltData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides a token for each border between two of them."""
    asked: list[int] = []
    read = Shards.tokens_and_loss

    def counted(
        shards: Shards, document: int, start: int, stop: int
    ) -> tuple[Tokens, LossMask | None]:
        asked.append(stop - start)
        return read(shards, document, start, stop)

    monkeypatch.setattr(Shards, "tokens_and_loss", counted)
    built.read_row(0, 0)
    whole = sum(asked)
    asked.clear()
    for first in range(0, SEQ_LEN, 8):
        built.read_row(0, 0, slice(first, first + 8))
    assert whole <= sum(asked) <= whole + SEQ_LEN // 8 - 1


def test_opening_reads_nothing_of_the_shards(built: BuiltData) -> None:
    """Whoever verified the build has read them; a rank that starts need not."""
    for path in built.directory.rglob("*.tokens"):
        path.write_bytes(b"")
    again = BuiltData.open(built.directory, is_checked=True)
    assert again.held_out[0].document_tokens.tolist() == built.held_out[0].document_tokens.tolist()
    with pytest.raises(DataError, match=r"documents-00000\.tokens: starts with b''"):
        again.read_row(0, 0)


def test_build_without_the_arrays_of_later_versions_is_read_all_the_same(built: BuiltData) -> None:
    manifest = built.manifest
    files = {}
    for name, entry in manifest.files.items():
        if Path(name).name in DERIVED_FILES:
            (built.directory / name).unlink()
        else:
            files[name] = entry
    assert len(manifest.files) - len(files) == 5 * len(built.source_names)
    dataclasses.replace(manifest, files=files).write(built.directory)
    again = BuiltData.open(built.directory)
    for source in range(len(built.source_names)):
        assert again.row_tokens(source).tolist() == built.row_tokens(source).tolist()
    for mine, theirs in zip(again.held_out, built.held_out, strict=True):
        assert mine.document_bytes.tolist() == theirs.document_bytes.tolist()
        assert mine.document_tokens.tolist() == theirs.document_tokens.tolist()
    for mine, theirs in zip(all_rows(again), all_rows(built), strict=True):
        assert np.array_equal(mine.labels, theirs.labels)
    assert again.manifest.row_hashes() == manifest.row_hashes()


@pytest.mark.parametrize("name", ["row_tokens", "document_tokens", "document_bytes"])
def test_array_that_does_not_fit_the_rows_is_refused(built: BuiltData, name: str) -> None:
    split = "train" if name == "row_tokens" else "held_out"
    path = built.directory / "ja_a" / split / f"{name}.npy"
    values = np.load(path)
    np.save(path, values[1:])
    manifest = built.manifest
    entry = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
    relative = path.relative_to(built.directory).as_posix()
    dataclasses.replace(manifest, files={**manifest.files, relative: entry}).write(built.directory)
    with pytest.raises(DataError, match="fit the"):
        BuiltData.open(built.directory)


def test_row_of_a_build_that_was_cut_off_since_is_an_error_and_no_other_row(
    built: BuiltData,
) -> None:
    path = built.directory / "en" / "documents-00000.tokens"
    row = built.read_row(2, 0)
    content = path.read_bytes()
    path.write_bytes(content[: HEADER_BYTES + 8])
    with pytest.raises(DataError, match=r"documents-00000\.tokens: ends \d+ bytes before"):
        built.read_row(2, 0)
    path.write_bytes(content)
    assert np.array_equal(built.read_row(2, 0).labels, row.labels)


SMALL_PROCESS = """
import os, resource, sys, threading
import numpy as np
from data_pipeline.dataset import BuiltData
soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
assert soft == 256
data = BuiltData.open(sys.argv[1])
num_rows = data.num_rows(0)
seen = [0, 0, 0, 0]
def read(first):
    for row in range(first, num_rows, 4):
        seen[first] += int((data.read_row(0, row).labels >= 0).sum())
threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(os.listdir("/proc/self/fd")) < 256
print(sum(seen), int(data.row_tokens(0).sum()))
"""


def test_build_of_1100_shards_is_read_with_256_open_files(tmp_path: Path) -> None:
    num_tokens = write_small_shards(tmp_path / "out", 1100)
    limited = 'ulimit -n 256; exec "$0" -c "$1" "$2"'
    run = subprocess.run(
        ["bash", "-c", limited, sys.executable, SMALL_PROCESS, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(num_tokens)] * 2


def write_small_shards(directory: Path, num_shards: int) -> int:
    """Write a build of one source with two documents a shard; return its predicted tokens."""
    folder = directory / "en"
    folder.mkdir(parents=True)
    for number in range(num_shards):
        # without a sync of each file
        with (folder / f"documents-{number:05d}.tokens").open("wb") as file:
            writer = ShardWriter(file)
            for length in (3, 5):
                writer.add(np.arange(length, dtype=np.uint32), length)
            writer.finish()
    lengths = np.tile(np.array([4, 6]), num_shards)
    nothing = np.zeros(0, np.int64)
    rows = pack(Segments.whole(np.arange(2 * num_shards), lengths), SEQ_LEN)
    no_rows = pack(Segments.whole(nothing, nothing), SEQ_LEN)
    for split, packed in (("train", rows), ("held_out", no_rows)):
        (folder / split).mkdir()
        for name in ARRAY_NAMES:
            save_array(folder / split / f"{name}.npy", getattr(packed, name))
        save_row_tokens(folder / split)
    save_array(folder / SHARD_DOCUMENTS_FILE, np.full(num_shards, 2))
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            entry = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
            files[path.relative_to(directory).as_posix()] = entry
    manifest_of(files, int(rows.piece_pairs.sum()), rows.num_rows).write(directory)
    return int(rows.piece_pairs.sum())


def manifest_of(files: dict[str, FileEntry], num_tokens: int, num_rows: int) -> BuildManifest:
    counts = dict.fromkeys(("documents", "tokens", "bytes", "duplicates", "near_duplicates"), 0)
    counts |= dict.fromkeys(("held_out_documents", "held_out_rows", "held_out_tokens"), 0)
    counts |= dict.fromkeys(("contaminated", "held_out_copies", "held_out_found"), 0)
    texts = {"name": "en", "language": "en", "domain": "web", "held_out_hash": "", "base_model": ""}
    source = SourceEntry(
        **texts, **counts, predicted_tokens=num_tokens, rows=num_rows, rejects={}, notes={}
    )
    return BuildManifest(
        format_version=FORMAT_VERSION,
        fingerprint="",
        tokenizer="",
        tokenizer_sha256="",
        seq_len=SEQ_LEN,
        sources=(source,),
        guard_domains=(),
        files=files,
    )
