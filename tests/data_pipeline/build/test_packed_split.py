"""Rows that tasks pack block by block are the bytes that one process packs in memory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build import packed_split
from data_pipeline.build.packed_split import PackedSplit, pack_split
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.store.packing import ARRAY_NAMES, RowIndex, Segments, pack


def draw_segments(seed: int, count: int) -> Segments:
    """Return segments of random lengths, some in one document."""
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(0, max(count, 1), count))
    start = rng.integers(0, 50, count)
    return Segments(document=document, start=start, tokens=rng.integers(2, 60, count))


def as_file(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values.astype("<i8"))
    return file.getvalue()


def packed_by_tasks(
    segments: Segments, method: str, block: int, workers: int = 1
) -> tuple[PackedSplit, dict[str, bytes]]:
    """Return the counts, and the bytes of each file."""
    with tempfile.TemporaryDirectory() as name, LocalExecutor(workers) as executor:
        folder = Path(name) / "build" / "s" / "train"
        folder.parent.mkdir(parents=True)
        packed = pack_split(folder, segments, 16, method, Path(name), executor, block)
        return packed, {path.stem: path.read_bytes() for path in folder.iterdir()}


def packed_in_memory(segments: Segments, method: str, block: int) -> RowIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.store.packing.BLOCK_DOCUMENTS", block)
        return pack(segments, 16, method)


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 60),
    block=st.sampled_from([1, 7, 16, 100]),
    method=st.sampled_from(["best_fit", "concatenate"]),
)
@settings(max_examples=25, deadline=None)
def test_files_of_rows_do_not_depend_on_tasks(
    seed: int, count: int, block: int, method: str
) -> None:
    segments = draw_segments(seed, count)
    rows = packed_in_memory(segments, method, block)
    expected = {name: as_file(getattr(rows, name)) for name in ARRAY_NAMES}
    packed, files = packed_by_tasks(segments, method, block)
    assert files == expected
    assert packed.num_rows == rows.num_rows
    assert packed.num_pairs == rows.piece_pairs.sum()


@given(seed=st.integers(0, 2**32), count=st.integers(0, 60), block=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_concatenation_in_blocks_is_that_of_all_segments(seed: int, count: int, block: int) -> None:
    segments = draw_segments(seed, count)
    whole = packed_in_memory(segments, "concatenate", 10**6)
    in_blocks = packed_in_memory(segments, "concatenate", block)
    for name in ARRAY_NAMES:
        assert getattr(whole, name).tolist() == getattr(in_blocks, name).tolist()


def test_three_workers_write_the_files_of_one() -> None:
    segments = draw_segments(1, 500)
    assert packed_by_tasks(segments, "best_fit", 100, 3) == packed_by_tasks(
        segments, "best_fit", 100
    )


def test_a_killed_pack_goes_on_and_other_segments_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = draw_segments(1, 60)
    folder = tmp_path / "build" / "s" / "train"
    folder.parent.mkdir(parents=True)
    packed_blocks: list[int] = []
    original = packed_split._pack_one

    def pack_some(block: packed_split._Block) -> None:
        if len(packed_blocks) == 2:
            raise KeyboardInterrupt
        packed_blocks.append(block.first)
        original(block)

    def pack_again(block: packed_split._Block) -> None:
        packed_blocks.append(block.first)
        original(block)

    with LocalExecutor() as executor:
        monkeypatch.setattr(packed_split, "_pack_one", pack_some)
        with pytest.raises(KeyboardInterrupt):
            pack_split(folder, segments, 16, "best_fit", tmp_path, executor, 20)
        assert packed_blocks == [0, 20]
        monkeypatch.setattr(packed_split, "_pack_one", pack_again)
        first = pack_split(folder, segments, 16, "best_fit", tmp_path, executor, 20)
        assert packed_blocks == [0, 20, 40]
        assert pack_split(folder, segments, 16, "best_fit", tmp_path, executor, 20) == first
        assert packed_blocks == [0, 20, 40]
        pack_split(folder, draw_segments(2, 60), 16, "best_fit", tmp_path, executor, 20)
    assert packed_blocks == [0, 20, 40, 0, 20, 40]
