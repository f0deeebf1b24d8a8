"""Segments of an earlier build are those of the whole source, and few of them are in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.reading import training_segments
from data_pipeline.reading.training_segments import TrainingSegments
from data_pipeline.store.packing import ARRAY_NAMES, Integers, Segments, pack
from data_pipeline.store.row_files import save_array
from data_pipeline.store.shards import Shards, write_shard

SHARDS = 3
MOST_BYTES = 8
"""Bytes a document that memory may grow by. All segments of a source took 24, and twice that when
they were sorted."""


def write_shards(folder: Path, lengths: Integers) -> Shards:
    """Write documents of some lengths, END_OF_TEXT included, into several shards."""
    names = []
    for number, some in enumerate(np.array_split(lengths, SHARDS)):
        names.append(f"documents-{number:05d}.tokens")
        with write_shard(folder / names[-1]) as shard:
            for length in some.tolist():
                shard.add(np.zeros(length - 1, np.uint32), num_bytes=int(length))
    return Shards(folder, names, verify=False)


def write_rows(folder: Path, segments: Segments, seq_len: int, method: str) -> Path:
    """Pack segments, and write the arrays of their rows."""
    folder.mkdir(parents=True)
    rows = pack(segments, seq_len, method)
    for name in ARRAY_NAMES:
        save_array(folder / f"{name}.npy", getattr(rows, name))
    return folder


def draw_segments(chance: np.random.Generator, lengths: Integers) -> Segments:
    """Return most of the documents, some of them cut in two."""
    columns: list[tuple[int, int, int]] = []
    for document, length in enumerate(lengths.tolist()):
        kind = chance.integers(0, 5)
        if kind == 0 and length >= 7:
            columns += [(document, 0, 3), (document, 4, length - 4)]
        elif kind > 1:
            columns.append((document, 0, length))
    table = np.array(columns, np.int64).reshape(-1, 3)
    return Segments(document=table[:, 0], start=table[:, 1], tokens=table[:, 2])


def joined(parts: Sequence[Segments]) -> list[list[int]]:
    """Return segments that were read range by range, as columns."""
    columns = []
    for name in ("document", "start", "tokens"):
        columns.append([value for part in parts for value in getattr(part, name).tolist()])
    return columns


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks and ranges be small."""
    monkeypatch.setattr(training_segments, "BLOCK_PIECES", 32)
    monkeypatch.setattr(training_segments, "RANGE_PIECES", 24)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("method", ["best_fit", "concatenate"])
def test_segments_of_ranges_are_those_that_rows_were_packed_from(
    num_stages: int, method: str, tmp_path: Path
) -> None:
    chance = np.random.default_rng(num_stages)
    lengths = chance.integers(2, 30, 200)
    shards = write_shards(tmp_path, lengths)
    trained = draw_segments(chance, lengths)
    stage_of = trained.document % num_stages
    folders = []
    for stage in range(num_stages):
        folder = tmp_path / f"train-{stage}"
        folders.append(write_rows(folder, trained.chosen(stage_of == stage), 11, method))
    segments = TrainingSegments(folders, shards)
    assert len(segments) == len(trained)
    for _ in range(20):
        start, stop = sorted(chance.integers(0, len(trained) + 1, 2).tolist())
        assert joined(list(segments.between(start, stop))) == joined([trained.part(start, stop)])
    assert joined(list(segments.between(0, len(trained)))) == joined([trained])


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize(
    ("column", "value"), [("document", 40), ("document", -1), ("start", 30), ("start", -1)]
)
def test_a_segment_outside_its_document_is_refused(column: str, value: int, tmp_path: Path) -> None:
    lengths = np.full(40, 9)
    shards = write_shards(tmp_path, lengths)
    trained = Segments.whole(np.arange(40), lengths)
    getattr(trained, column)[17] = value
    folder = write_rows(tmp_path / "train", trained, 11, "best_fit")
    segments = TrainingSegments([folder], shards)
    with pytest.raises(DataError, match=f"{folder}: .*build it again"):
        list(segments.between(0, 40))


def peak_bytes(folder: Path, num_documents: int) -> int:
    """Return the most memory, in bytes, that the reading of a few segments takes."""
    lengths = np.full(num_documents, 2)
    shards = write_shards(folder, lengths)
    trained = Segments.whole(np.arange(num_documents), lengths)
    rows = write_rows(folder / "train", trained, 16, "concatenate")
    tracemalloc.start()
    try:
        segments = TrainingSegments([rows], shards)
        assert len(list(segments.between(num_documents // 2, num_documents // 2 + 1))) == 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_earlier_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_segments, "BLOCK_PIECES", 256)
    monkeypatch.setattr(training_segments, "RANGE_PIECES", 256)
    small, large = 1000, 9000
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    growth = peak_bytes(tmp_path / "large", large) - peak_bytes(tmp_path / "small", small)
    assert growth < MOST_BYTES * (large - small), f"{growth / (large - small):.0f} bytes a document"
