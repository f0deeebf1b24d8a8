"""Short held-out documents are found wherever they stand, exactly as brute force finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fates.short_texts import ShortTexts, find_short_texts
from data_pipeline.text.tokenizer import END_OF_TEXT

ENDS = 2
Found = list[tuple[int, int]]


def find(documents: list[list[int]], texts: ShortTexts, train: list[bool] | None = None) -> Found:
    """Return (place, tokens) of what is found in a shard of these documents."""
    tokens = np.array([token for one in documents for token in [*one, END_OF_TEXT]], np.uint32)
    offsets = np.cumsum([0, *(len(one) + 1 for one in documents)])
    mask = np.array(train or [True] * len(documents))
    found = find_short_texts(tokens, offsets, mask, texts)
    return list(zip(found.places.tolist(), found.tokens.tolist(), strict=True))


def tables(documents: list[list[int]]) -> ShortTexts:
    return ShortTexts.from_documents([np.array(one, np.uint32) for one in documents])


def brute_force(documents: list[list[int]], held: list[list[int]]) -> Found:
    found = set()
    first = 0
    for document in documents:
        for one in held:
            wanted = one[ENDS:-ENDS]
            for place in range(len(document) - len(wanted) + 1):
                if document[place : place + len(wanted)] == wanted:
                    found.add((first + place, len(wanted)))
        first += len(document) + 1
    return sorted(found)


held_documents = st.lists(
    st.lists(st.integers(0, 1), min_size=20, max_size=49), min_size=1, max_size=4
)


@given(
    held_documents,
    st.lists(
        st.one_of(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=70)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
)
@settings(max_examples=50, deadline=None)
def test_short_documents_are_what_brute_force_finds(
    held: list[list[int]], pieces: list[int | list[int]], places: int
) -> None:
    document: list[int] = []
    for piece in pieces:
        document += held[piece % len(held)] if isinstance(piece, int) else piece
    documents = [document, document[3:], held[0][ENDS:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.fates.short_texts._PLACES", places)
        assert find(documents, tables(held)) == brute_force(documents, held)


def test_documents_that_are_not_trained_on_are_not_searched(tmp_path: Path) -> None:
    held = [list(range(20)), list(range(100, 149))]
    tables(held).save(tmp_path)
    texts = ShortTexts.load(tmp_path)
    documents = [[7, *held[0], 7], [*held[1], *held[0]]]
    assert find(documents, texts, [False, True]) == [(23 + ENDS, 45), (23 + 49 + ENDS, 16)]
    assert find(documents, tables([])) == []
