"""Held-out text in a shard is found exactly as brute force finds it, and cut by the rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.fates.decontamination import (
    EDGE_TOKENS,
    MAX_STRETCHES,
    NEEDED_WINDOWS,
    HeldOutRuns,
    Hits,
    Stretches,
    count_documents,
    find_hits,
    sampled_window_hashes,
    what_is_left,
)
from data_pipeline.parts.near_duplicates import window_hashes
from data_pipeline.text.tokenizer import END_OF_TEXT

WINDOW = 4
Window = tuple[int, ...]


def windows_of(values: list[int]) -> list[Window]:
    return [tuple(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def brute_force(train: list[list[int]], held: list[list[int]]) -> dict[int, list[int]]:
    """Return the places of the windows that count, by document."""
    known = set()
    for values in held:
        if len(values) >= WINDOW + EDGE_TOKENS:
            known |= set(windows_of(values))
    found = {}
    for number, values in enumerate(train):
        hits = [window in known for window in windows_of(values)]
        places = set()
        for start in range(len(hits) - NEEDED_WINDOWS + 1):
            if all(hits[start : start + NEEDED_WINDOWS]):
                places |= set(range(start, start + NEEDED_WINDOWS))
        if places:
            found[number] = sorted(places)
    return found


@given(st.lists(st.integers(0, 200_000), max_size=120), st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_sampled_hashes_are_every_ninth_of_all(values: list[int], length: int) -> None:
    tokens = np.array(values, dtype=np.uint32)
    expected = window_hashes(tokens, length)[::NEEDED_WINDOWS]
    assert sampled_window_hashes(tokens, length).tolist() == expected.tolist()


token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@given(
    st.lists(token_lists, min_size=1, max_size=3),
    st.lists(token_lists, min_size=1, max_size=6),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_hits_are_what_brute_force_finds(
    held: list[list[int]], train: list[list[int]], block: int
) -> None:
    runs = HeldOutRuns.from_documents(
        [np.array(values, np.uint32) for values in held], WINDOW + EDGE_TOKENS
    )
    assert runs.window == WINDOW
    tokens = np.array([token for values in train for token in [*values, END_OF_TEXT]], np.uint32)
    offsets = np.cumsum([0, *(len(values) + 1 for values in train)])
    with pytest.MonkeyPatch.context() as patch:
        size = block * NEEDED_WINDOWS
        patch.setattr("data_pipeline.fates.decontamination._BLOCK_TOKENS", size)
        hits = find_hits(tokens, offsets, np.ones(len(train), bool), runs)
    expected = brute_force(train, held)
    places = []
    documents_by_window: dict[Window, set[int]] = {}
    for document, found in expected.items():
        for place in found:
            places.append(offsets[document] + place)
            window = tuple(train[document][place : place + WINDOW])
            documents_by_window.setdefault(window, set()).add(document)
    assert hits.places.tolist() == places
    _, counts = count_documents(hits, offsets)
    assert sorted(counts.tolist()) == sorted(map(len, documents_by_window.values()))
    stretches = dict(Stretches.of_hits(hits, offsets, WINDOW).by_document())
    covered = {}
    for document, some in stretches.items():
        covered[document] = {token for start, stop in some for token in range(start, stop)}
    wanted = {}
    for document, found in expected.items():
        wanted[document] = {place + step for place in found for step in range(WINDOW)}
    assert covered == wanted


def test_documents_that_are_not_trained_on_have_no_hits() -> None:
    values = np.arange(60, dtype=np.uint32)
    runs = HeldOutRuns.from_documents([values], 50)
    tokens = np.concatenate([values, [END_OF_TEXT], values, [END_OF_TEXT]]).astype(np.uint32)
    hits = find_hits(tokens, np.array([0, 61, 122]), np.array([False, True]), runs)
    assert hits.places.tolist() == list(range(61, 61 + 19))


def test_tables_grow_with_the_held_out_text_and_come_back_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for num_tokens in (1000, 100_000):
        held = rng.integers(0, 200_000, num_tokens).astype(np.uint32)
        runs = HeldOutRuns.from_documents([held], 50)
        bits_a_run = 64 * len(runs.filter) / len(runs.hashes)
        assert 16 <= bits_a_run < 65
        others = window_hashes(rng.integers(0, 200_000, 50_000).astype(np.uint32), runs.window)
        assert (runs.numbers(others) == -1).all()
        runs.save(tmp_path)
        loaded = HeldOutRuns.load(tmp_path, 50)
        own = window_hashes(held, runs.window)
        assert (runs.hashes[loaded.numbers(own)] == own).all()
        assert isinstance(loaded.filter.base, np.memmap)


def test_no_held_out_text_gives_no_hits() -> None:
    runs = HeldOutRuns.from_documents([np.arange(10, dtype=np.uint32)], 50)
    tokens = np.arange(100, dtype=np.uint32)
    assert not len(find_hits(tokens, np.array([0, 100]), np.ones(1, bool), runs).places)


RULES = DecontaminationConfig(tokens=50, min_kept_tokens=200)


@pytest.mark.parametrize(
    ("stretches", "num_tokens", "kept"),
    [
        ([(1000, 1050)], 3000, [(0, 950), (1100, 3000)]),
        ([(0, 60)], 3000, [(110, 3000)]),
        ([(2950, 3000)], 3000, [(0, 2900)]),
        # a side that is too short goes, too
        ([(200, 260)], 3000, [(310, 3000)]),
        # what lies between two stretches is kept if it is long enough
        ([(1000, 1050), (1300, 1350)], 3000, [(0, 950), (1400, 3000)]),
        ([(1000, 1050), (1500, 1550)], 3000, [(0, 950), (1100, 1450), (1600, 3000)]),
        # margins that meet
        ([(1000, 1050), (1120, 1200)], 3000, [(0, 950), (1250, 3000)]),
        # a short document goes, and one that is mostly held-out text
        ([(100, 160)], 300, []),
        ([(0, 1600)], 3000, []),
    ],
)
def test_a_long_document_loses_the_stretch_and_a_short_one_goes(
    stretches: list[tuple[int, int]], num_tokens: int, kept: list[tuple[int, int]]
) -> None:
    assert what_is_left(stretches, num_tokens, RULES) == kept


def test_a_document_with_very_many_stretches_goes() -> None:
    most = [(1000 * number, 1000 * number + 50) for number in range(1, MAX_STRETCHES + 1)]
    assert len(what_is_left(most, 20_000, RULES)) == MAX_STRETCHES + 1
    assert what_is_left([*most, (15_000, 15_050)], 20_000, RULES) == []


stretches_of_a_document = st.lists(
    st.tuples(st.integers(0, 4000), st.integers(50, 400)), min_size=1, max_size=14
)


@given(stretches_of_a_document, st.integers(4500, 9000))
@settings(max_examples=200, deadline=None)
def test_what_is_left_holds_nothing_near_a_stretch(
    spans: list[tuple[int, int]], num_tokens: int
) -> None:
    stretches = sorted((start, start + length) for start, length in spans)
    kept = what_is_left(stretches, num_tokens, RULES)
    assert sum(stop - start for start, stop in kept) >= num_tokens / 2 or not kept
    for start, stop in kept:
        assert stop - start >= RULES.min_kept_tokens
        for first, last in stretches:
            assert stop <= max(first - RULES.tokens, 0) or start >= min(
                last + RULES.tokens, num_tokens
            )


def test_hits_that_stand_alone_do_not_count() -> None:
    places = np.array([5, 6, 7, 20, 21, 22, 23, 24, 25, 26, 27, 28, 40])
    hits = Hits(places=places, numbers=np.arange(len(places))).in_rows()
    assert hits.places.tolist() == list(range(20, 29))
    assert hits.numbers.tolist() == list(range(3, 12))
