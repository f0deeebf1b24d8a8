"""Fates that tasks decide out of core are those that one process decides in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.deduplication import Fate, Hashes
from data_pipeline.build.exact_copies import decide_exact
from data_pipeline.build.near_copies import Sizes, mark_near_copies
from data_pipeline.build.near_duplicates import NUM_BANDS, NUM_HASHES, Signatures
from data_pipeline.build.salted_digests import SALT, salted_digests
from data_pipeline.build.source_parts import SourceParts
from data_pipeline.engine.local import LocalExecutor
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
