"""Fates that tasks decide out of core are those that one process decides in memory."""

from __future__ import annotations

import shutil
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import duckdb
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.engine.local import LocalExecutor
from data_pipeline.fates import exact_copies, near_copies
from data_pipeline.fates.deduplication import Fate
from data_pipeline.fates.embedded_engine import open_engine
from data_pipeline.fates.exact_copies import decide_exact
from data_pipeline.fates.near_copies import Sizes, mark_near_copies
from data_pipeline.fates.steps import STEPS_FOLDER
from data_pipeline.parts.near_duplicates import NUM_BANDS, NUM_HASHES, Signatures
from data_pipeline.parts.part_groups import group_parts, numbered_parts
from data_pipeline.parts.salted_digests import SALT, salted_digests
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.hashing import splitmix64
from tests.support.array_parts import write_source
from tests.support.fates_in_memory import decide_fates, mark_near_duplicates

SHARES = (0.0, 1e-9, 0.3, 0.9999, 1.0)
TINY = Sizes(group_documents=7, slot_records=24, task_records=200, stretch_documents=9)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=20))
@settings(deadline=None)
def test_digests_of_arrays_are_those_of_xxhash(halves: list[tuple[int, int]]) -> None:
    pairs = np.array(halves, np.uint64).reshape(-1, 2)
    expected = [xxhash.xxh3_64_intdigest(SALT + pair.astype("<u8").tobytes()) for pair in pairs]
    assert salted_digests(pairs[:, 0], pairs[:, 1]).tolist() == expected


def draw_hashes(rng: np.random.Generator, count: int) -> Hashes:
    """Return hashes of few different texts, some with equal halves."""
    values = np.zeros(count, np.dtype([("high", "<u8"), ("low", "<u8")]))
    values["high"] = xxhash_of(rng.integers(0, max(count // 2, 2), count))
    values["low"] = rng.integers(0, 2, count)
    return values


def xxhash_of(values: np.ndarray) -> list[int]:
    return [xxhash.xxh3_64_intdigest(int(value).to_bytes(8, "little")) for value in values]


def draw_signatures(rng: np.random.Generator, count: int) -> Signatures:
    """Return signatures of documents that differ from a few originals in some bands."""
    originals = rng.integers(0, 2**32, (max(count // 4, 1), NUM_HASHES), np.uint32)
    signatures = originals[rng.integers(0, len(originals), count)]
    is_changed = rng.random((count, NUM_HASHES)) < rng.choice([0.0, 0.1, 0.2, 0.5], (count, 1))
    changes = rng.integers(0, 2**32, (count, NUM_HASHES), np.uint32)
    return np.where(is_changed, changes, signatures)


def split_randomly(rng: np.random.Generator, count: int) -> list[int]:
    """Return where parts begin, after the first."""
    num_cuts = min(int(rng.integers(0, 4)), count - 1)
    return sorted(rng.choice(np.arange(1, count), num_cuts, replace=False).tolist())


def draw_sources(
    rng: np.random.Generator, work_dir: Path, sizes: Sequence[int], mock: int | None
) -> tuple[list[SourceParts], list[Hashes], list[Signatures]]:
    """Write sources of random documents, and return them with hashes and signatures of each."""
    all_hashes = draw_hashes(rng, sum(sizes))
    all_signatures = draw_signatures(rng, sum(sizes))
    gathered = []
    hashes = []
    signatures = []
    first = 0
    for number, size in enumerate(sizes):
        chosen = slice(first, first + size)
        first += size
        cuts = split_randomly(rng, size)
        is_mock = number == mock
        hashes.append(all_hashes[chosen])
        signatures.append(all_signatures[chosen])
        gathered.append(
            write_source(
                work_dir,
                f"s{number}",
                np.split(hashes[-1], cuts),
                None if is_mock else np.split(signatures[-1], cuts),
                is_mock=is_mock,
            )
        )
    return gathered, hashes, signatures


def in_memory(
    gathered: Sequence[SourceParts],
    hashes: Sequence[Hashes],
    signatures: Sequence[Signatures],
    shares: Sequence[float],
) -> tuple[list[int], list[int]]:
    """Return the fates after exact and after near copies, as the reference decides them."""
    exact = np.concatenate([one.fates for one in decide_fates(hashes, shares)])
    near = exact.copy()
    is_real = np.concatenate(
        [np.full(len(h), not g.is_mock) for g, h in zip(gathered, hashes, strict=True)]
    )
    real = near[is_real]
    parts = [s for g, s in zip(gathered, signatures, strict=True) if not g.is_mock]
    mark_near_duplicates(real, parts, 0.8)
    near[is_real] = real
    return exact.tolist(), near.tolist()


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    shares=st.lists(st.sampled_from(SHARES), min_size=4, max_size=4),
    mock=st.sampled_from([None, None, 0, 1]),
    is_tiny=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_any_corpus_has_the_fates_of_the_reference(
    seed: int, sizes: list[int], shares: list[float], mock: int | None, is_tiny: bool
) -> None:
    if mock is not None and len(sizes) <= max(mock, 1):
        mock = None
    rng = np.random.default_rng(seed)
    shares = shares[: len(sizes)]
    with tempfile.TemporaryDirectory() as name, LocalExecutor() as executor:
        work_dir = Path(name)
        gathered, hashes, signatures = draw_sources(rng, work_dir, sizes, mock)
        exact, near = in_memory(gathered, hashes, signatures, shares)
        if is_tiny:
            fates, is_copied = decide_exact(
                gathered, shares, work_dir, executor, group_documents=7, slot_documents=12
            )
        else:
            fates, is_copied = decide_exact(gathered, shares, work_dir, executor)
        assert fates.tolist() == exact
        joined = np.concatenate(hashes)
        for number in np.flatnonzero(fates == Fate.HELD_OUT).tolist():
            assert is_copied[number] == (np.count_nonzero(joined == joined[number]) > 1)
        mark_near_copies(fates, gathered, 0.8, work_dir, executor, TINY if is_tiny else None)
        assert fates.tolist() == near


@pytest.mark.parametrize("workers", [1, 3])
def test_fates_depend_neither_on_workers_nor_on_the_size_of_tasks(
    workers: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    gathered, hashes, signatures = draw_sources(rng, tmp_path, [300, 500, 200], None)
    shares = [0.1, 0.0, 1.0]
    exact, near = in_memory(gathered, hashes, signatures, shares)
    sizes = Sizes(group_documents=200, slot_records=300, task_records=4000, stretch_documents=400)
    with LocalExecutor(workers) as executor:
        fates, _ = decide_exact(
            gathered, shares, tmp_path, executor, group_documents=200, slot_documents=300
        )
        assert fates.tolist() == exact
        mark_near_copies(fates, gathered, 0.8, tmp_path, executor, sizes)
    assert fates.tolist() == near
    assert near.count(Fate.NEAR_DUPLICATE) > 50


def test_documents_that_all_differ_open_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening one takes as long as all else that a small build does."""

    def refuse(folder: Path) -> NoReturn:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr(exact_copies, "open_engine", refuse)
    hashes = np.zeros(60, np.dtype([("high", "<u8"), ("low", "<u8")]))
    hashes["high"] = splitmix64(np.arange(60, dtype=np.uint64))
    parts = np.split(hashes, [20, 40])
    shares = [0.0, 0.3, 1.0]
    gathered = [write_source(tmp_path, f"s{n}", [part]) for n, part in enumerate(parts)]
    with LocalExecutor() as executor:
        fates, is_copied = decide_exact(gathered, shares, tmp_path, executor)
    expected = np.concatenate([one.fates for one in decide_fates(parts, shares)])
    assert fates.tolist() == expected.tolist()
    assert np.count_nonzero(fates == Fate.HELD_OUT) > 20
    assert not is_copied.any()


def test_near_copies_are_counted_by_source_and_that_of_the_original(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    one, other, third = rng.integers(0, 2**32, (3, NUM_HASHES), np.uint32)
    hashes = draw_hashes(rng, 7)
    signatures = np.stack([one, other, one, other, third, third, one])
    gathered = [
        write_source(tmp_path, "a", [hashes[:2]], [signatures[:2]]),
        write_source(tmp_path, "b", [hashes[2:]], [signatures[2:]]),
    ]
    before = np.zeros(7, np.uint8)
    before[3] = Fate.HELD_OUT
    with LocalExecutor() as executor:
        for _ in range(2):  # the second time the result is there
            fates = before.copy()
            counts = mark_near_copies(fates, gathered, 0.8, tmp_path, executor)
            # 'one' is first in a, 'other' is held out by b, 'third' repeats within b
            assert counts.tolist() == [[0, 1], [2, 1]]
    assert np.flatnonzero(fates == Fate.NEAR_DUPLICATE).tolist() == [1, 2, 5, 6]


def test_a_long_chain_of_near_copies_is_one_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    count = 1500
    signature = rng.integers(0, 2**32, NUM_HASHES, np.uint32)
    chain = np.empty((count, NUM_HASHES), np.uint32)
    for number in range(count):
        # each differs from the one before it in one band, so the ends share nothing
        band = number % NUM_BANDS
        signature[4 * band : 4 * band + 4] = rng.integers(0, 2**32, 4, np.uint32)
        chain[number] = signature
    hashes = draw_hashes(rng, count)
    gathered = [write_source(tmp_path, "s", [hashes], [chain])]
    fates = np.zeros(count, np.uint8)
    with LocalExecutor() as executor:
        mark_near_copies(fates, gathered, 0.8, tmp_path, executor)
    assert fates.tolist() == [Fate.TRAIN] + [Fate.NEAR_DUPLICATE] * (count - 1)


def count_runs_of(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, names: Sequence[str], stop_in: str | None
) -> Counter[str]:
    """Count the tasks of a module by name; the second one of `stop_in` is interrupted."""
    counts: Counter[str] = Counter()

    def counted(name: str, original: Callable[[object], object]) -> Callable[[object], object]:
        def work(task: object) -> object:
            counts[name] += 1
            if name == stop_in and counts[name] == 2:
                raise KeyboardInterrupt
            return original(task)

        return work

    for name in names:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, counted(name, original))
    return counts


@pytest.mark.parametrize("stop_in", ["_write_hashes", "_compare_slot"])
def test_a_killed_search_for_copies_repeats_nothing_that_was_done(
    stop_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered, hashes, signatures = draw_sources(np.random.default_rng(5), tmp_path, [30, 30], None)
    exact, _ = in_memory(gathered, hashes, signatures, [0.1, 0.0])
    names = ("_write_hashes", "_compare_slot")

    def decide() -> list[int]:
        with LocalExecutor() as executor:
            found, _ = decide_exact(
                gathered, [0.1, 0.0], tmp_path, executor, group_documents=20, slot_documents=20
            )
        return found.tolist()

    with monkeypatch.context() as patch:
        before = count_runs_of(patch, exact_copies, names, stop_in)
        with pytest.raises(KeyboardInterrupt):
            decide()
    with monkeypatch.context() as patch:
        after = count_runs_of(patch, exact_copies, names, None)
        assert decide() == exact
        # the interrupted one was begun twice
        assert before[stop_in] + after[stop_in] == num_tasks(stop_in, gathered) + 1
        assert decide() == exact
        assert before[stop_in] + after[stop_in] == num_tasks(stop_in, gathered) + 1
    assert not list(tmp_path.rglob("spill-*"))


def num_tasks(name: str, gathered: Sequence[SourceParts]) -> int:
    """Return how many tasks of a kind the search for copies has, with 20 documents each."""
    if name == "_compare_slot":
        return 4
    return len(list(group_parts(numbered_parts(gathered), 20)))


@pytest.mark.parametrize("stop_in", ["_write_keys", "_write_pairs", "_verify_pairs"])
def test_a_killed_search_for_near_copies_gives_the_same_fates_in_the_end(
    stop_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered, hashes, signatures = draw_sources(np.random.default_rng(6), tmp_path, [60], None)
    exact, near = in_memory(gathered, hashes, signatures, [0.1])
    names = ("_write_keys", "_write_pairs", "_verify_pairs")
    sizes = Sizes(group_documents=20, slot_records=60, task_records=600, stretch_documents=20)

    def mark() -> list[int]:
        fates = np.array(exact, np.uint8)
        with LocalExecutor() as executor:
            mark_near_copies(fates, gathered, 0.8, tmp_path, executor, sizes)
        return fates.tolist()

    with monkeypatch.context() as patch:
        before = count_runs_of(patch, near_copies, names, stop_in)
        with pytest.raises(KeyboardInterrupt):
            mark()
    with monkeypatch.context() as patch:
        after = count_runs_of(patch, near_copies, names, None)
        assert mark() == near
        for name in names[: names.index(stop_in)]:
            assert after[name] == 0
        done = +after
        assert mark() == near
        assert after == done
    assert sum(before.values()) + sum(after.values()) == 1 + sum(
        count_all_tasks(tmp_path, gathered, exact, sizes, monkeypatch).values()
    )


def count_all_tasks(
    tmp_path: Path,
    gathered: Sequence[SourceParts],
    exact: Sequence[int],
    sizes: Sizes,
    monkeypatch: pytest.MonkeyPatch,
) -> Counter[str]:
    """Return the tasks of a search for near copies that nothing interrupts."""
    shutil.rmtree(tmp_path / STEPS_FOLDER)
    with monkeypatch.context() as patch, LocalExecutor() as executor:
        names = ("_write_keys", "_write_pairs", "_verify_pairs")
        counts = count_runs_of(patch, near_copies, names, None)
        mark_near_copies(np.array(exact, np.uint8), gathered, 0.8, tmp_path, executor, sizes)
    return counts


def test_what_other_hashes_left_is_never_used(tmp_path: Path) -> None:
    """A step whose inputs changed starts anew, though all its files are there."""
    shares = [0.1]
    with LocalExecutor() as executor:
        for seed in (1, 2):
            work_dir = tmp_path / "work"
            shutil.rmtree(work_dir / "parts", ignore_errors=True)
            rng = np.random.default_rng(seed)
            gathered, hashes, signatures = draw_sources(rng, work_dir, [40 + seed], None)
            exact, near = in_memory(gathered, hashes, signatures, shares)
            fates, _ = decide_exact(gathered, shares, work_dir, executor)
            assert fates.tolist() == exact
            mark_near_copies(fates, gathered, 0.8, work_dir, executor)
            assert fates.tolist() == near
    assert len(list((tmp_path / "work" / STEPS_FOLDER).iterdir())) == 2


def test_a_text_that_half_of_the_corpus_repeats_goes_to_disk(tmp_path: Path) -> None:
    """The engine's limit holds, and the answer is right, though one group exceeds the memory."""
    count = 400_000
    numbers = np.arange(count, dtype=np.uint32)
    same = np.where(numbers % 2 == 0, 7, splitmix64(numbers.astype(np.uint64)))
    with open_engine(tmp_path, 2**24) as engine:
        for start in range(8):
            batch = {"value": same, "number": numbers + start * count}
            engine.load(f"t{start}", [batch])
        union = " UNION ALL ".join(f"SELECT * FROM t{start}" for start in range(8))
        found = 0
        for columns in engine.query(f"SELECT value, count(*) AS n FROM ({union}) GROUP BY value"):
            found += int(columns["n"].sum())
            assert set(columns["n"].tolist()) <= {8, 4 * count}
        spilled = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert found == 8 * count
    assert spilled > 0
    assert not list(tmp_path.iterdir())


def test_an_engine_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    with open_engine(tmp_path) as engine, pytest.raises(duckdb.PermissionException):
        list(engine.query(f"SELECT * FROM read_csv('{tmp_path / 'a.csv'}')"))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that Python and NumPy held at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_process_that_leads_holds_few_bytes_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 million documents take 1.2 GB for exact copies and 2.4 GB for near copies."""
    monkeypatch.setattr(near_copies, "_SLICE_DOCUMENTS", 1 << 12)
    count = 1_000_000
    rng = np.random.default_rng(7)
    fates = np.zeros(count, np.uint8)
    pairs = np.sort(rng.integers(0, count, (count // 5, 2), np.uint32), axis=1)
    with (tmp_path / "edges.npy").open("wb") as file:
        np.save(file, pairs)
    edges = [tmp_path / "edges.npy"]
    near = peak_bytes(lambda: near_copies._fates_of_groups(fates, edges, [count]))
    assert near < 6.5 * count
    hashes = np.zeros(count, np.dtype([("high", "<u8"), ("low", "<u8")]))
    hashes["high"] = splitmix64(np.arange(count, dtype=np.uint64))
    gathered = [write_source(tmp_path, "s", np.array_split(hashes, 50))]
    with LocalExecutor() as executor:
        decide = partial(decide_exact, gathered, [0.0], tmp_path, executor)
        decide()
        exact = peak_bytes(decide)
    assert exact < 3.5 * count


def test_memory_of_a_task_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Four times the documents give tasks of the same size."""
    sizes = Sizes(
        group_documents=1000, slot_records=1000, task_records=60_000, stretch_documents=4000
    )
    peaks = []
    for count in (4_000, 16_000):
        rng = np.random.default_rng(count)
        signatures = rng.integers(0, 2**32, (count, NUM_HASHES), np.uint32)
        hashes = np.zeros(count, np.dtype([("high", "<u8"), ("low", "<u8")]))
        work_dir = tmp_path / str(count)
        num_parts = count // 500
        gathered = [
            write_source(
                work_dir,
                "s",
                np.array_split(hashes, num_parts),
                np.array_split(signatures, num_parts),
            )
        ]
        del signatures
        fates = np.zeros(count, np.uint8)
        with LocalExecutor() as executor:
            peaks.append(
                peak_bytes(
                    partial(mark_near_copies, fates, gathered, 0.8, work_dir, executor, sizes)
                )
            )
    assert peaks[1] < 1.3 * peaks[0]
