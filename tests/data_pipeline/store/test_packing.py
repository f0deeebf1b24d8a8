"""Packing keeps every pair exactly once and cuts nothing that fits."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.store.packing import RowIndex, Segments, pack, segments_of

lengths_and_seq_len = st.tuples(st.lists(st.integers(2, 60), max_size=60), st.integers(2, 25))


def whole(lengths: list[int]) -> Segments:
    return Segments.whole(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))


def packed(lengths: list[int], seq_len: int) -> RowIndex:
    return pack(whole(lengths), seq_len)


def pairs_of_rows(rows: RowIndex) -> list[tuple[int, int]]:
    """Return (document, position) of every pair, in the order of the rows."""
    pairs = []
    pieces = zip(rows.piece_document, rows.piece_start, rows.piece_pairs, strict=True)
    for document, start, count in pieces:
        for position in range(start, start + count):
            pairs.append((int(document), int(position)))
    return pairs


def pairs_of_documents(lengths: list[int]) -> list[tuple[int, int]]:
    """Return (document, position) of every pair, in the order of the documents."""
    pairs = []
    for document, length in enumerate(lengths):
        for position in range(length - 1):
            pairs.append((document, position))
    return pairs


def num_pairs(lengths: list[int]) -> int:
    return sum(lengths) - len(lengths)


@settings(max_examples=200, deadline=None)
@given(lengths_and_seq_len)
def test_every_pair_is_present_exactly_once(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    rows = packed(lengths, seq_len)
    assert Counter(pairs_of_rows(rows)) == Counter(pairs_of_documents(lengths))


@settings(max_examples=200, deadline=None)
@given(lengths_and_seq_len)
def test_no_row_is_empty_or_overfull_and_totals_agree(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    rows = packed(lengths, seq_len)
    totals = rows.row_tokens()
    assert len(totals) == rows.num_rows
    assert totals.sum() == num_pairs(lengths)
    assert ((totals >= 1) & (totals <= seq_len)).all()


@settings(max_examples=200, deadline=None)
@given(lengths_and_seq_len)
def test_a_document_that_fits_a_row_is_never_cut(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    num_pieces = Counter(packed(lengths, seq_len).piece_document.tolist())
    for document, length in enumerate(lengths):
        assert num_pieces.pop(document) == math.ceil((length - 1) / seq_len)
    assert not num_pieces


@settings(max_examples=100, deadline=None)
@given(lengths_and_seq_len)
def test_no_two_rows_could_have_been_one(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    totals = np.sort(packed(lengths, seq_len).row_tokens())
    assert len(totals) < 2 or totals[0] + totals[1] > seq_len


def test_equal_lengths_give_equal_rows() -> None:
    lengths = [(i * 7919) % 50 + 2 for i in range(500)]
    first = packed(lengths, 32)
    second = packed(lengths, 32)
    for name in ("row_offsets", "piece_document", "piece_start", "piece_pairs"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == np.int64


def test_document_numbers_are_passed_through() -> None:
    rows = pack(Segments.whole(np.array([7, 3]), np.array([3, 12])), 5)
    assert sorted(rows.piece_document.tolist()) == [3, 3, 3, 7]


@pytest.mark.parametrize("seq_len", [4096, 32768])
def test_padding_is_rare_and_packing_quick(seq_len: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(6.5, 1.1, 20_000).astype(np.int64) + 2, 200_000)
    start = time.process_time()
    rows = pack(Segments.whole(np.arange(len(lengths)), lengths), seq_len)
    assert time.process_time() - start < 1.0
    assert 1 - rows.row_tokens().sum() / (rows.num_rows * seq_len) < 0.002


@settings(max_examples=200, deadline=None)
@given(lengths_and_seq_len)
def test_concatenation_fills_every_row_but_the_last_and_loses_no_pair(
    case: tuple[list[int], int],
) -> None:
    lengths, seq_len = case
    rows = pack(whole(lengths), seq_len, "concatenate")
    totals = rows.row_tokens().tolist()
    assert all(total == seq_len for total in totals[:-1])
    assert sum(totals) == num_pairs(lengths)
    assert pairs_of_rows(rows) == pairs_of_documents(lengths)


def test_concatenation_cuts_documents_that_would_fit_and_best_fit_does_not() -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(6.5, 1.1, 5000).astype(np.int64) + 2, 20_000)
    fitting = np.flatnonzero(lengths <= 4097)
    cut = {}
    for method in ("best_fit", "concatenate"):
        rows = pack(Segments.whole(np.arange(5000), lengths), 4096, method)
        counts = np.bincount(rows.piece_document, minlength=5000)
        cut[method] = float((counts[fitting] > 1).mean())
    assert cut["best_fit"] == 0 and cut["concatenate"] > 0.1


@settings(max_examples=50, deadline=None)
@given(lengths_and_seq_len, st.integers(1, 20))
def test_packing_in_blocks_keeps_every_pair(case: tuple[list[int], int], block: int) -> None:
    lengths, seq_len = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.store.packing.BLOCK_DOCUMENTS", block)
        rows = packed(lengths, seq_len)
    assert rows.row_tokens().max(initial=0) <= seq_len
    assert rows.row_tokens().sum() == num_pairs(lengths)
    assert rows.row_offsets[-1] == len(rows.piece_document)
    assert (np.diff(rows.row_offsets) > 0).all()


@st.composite
def cut_documents(draw: st.DrawFn) -> Segments:
    """Draw documents with one or more segments each, between which tokens are left out."""
    documents: list[int] = []
    starts: list[int] = []
    tokens: list[int] = []
    for document in range(draw(st.integers(0, 12))):
        place = 0
        for _ in range(draw(st.integers(1, 4))):
            place += draw(st.integers(0, 5))
            length = draw(st.integers(2, 40))
            documents.append(document)
            starts.append(place)
            tokens.append(length)
            place += length + 1
    columns = [np.array(values, dtype=np.int64) for values in (documents, starts, tokens)]
    return Segments(document=columns[0], start=columns[1], tokens=columns[2])


@settings(max_examples=200, deadline=None)
@given(cut_documents(), st.integers(2, 25), st.sampled_from(["best_fit", "concatenate"]))
def test_rows_hold_the_pairs_of_every_segment_and_tell_the_segments(
    segments: Segments, seq_len: int, method: str
) -> None:
    rows = pack(segments, seq_len, method)
    expected = []
    stretches = zip(segments.document, segments.start, segments.tokens, strict=True)
    for document, start, tokens in stretches:
        expected += [(int(document), int(place)) for place in range(start, start + tokens - 1)]
    assert Counter(pairs_of_rows(rows)) == Counter(expected)
    found = segments_of(rows)
    for name in ("document", "start", "tokens"):
        assert getattr(found, name).tolist() == getattr(segments, name).tolist()
