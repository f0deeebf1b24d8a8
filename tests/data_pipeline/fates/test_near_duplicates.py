"""Near copies are found, exactly as brute force would find them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.build import build
from data_pipeline.fates.deduplication import Fate
from data_pipeline.parts.near_duplicates import (
    minhash_signatures,
    window_hashes,
)
from data_pipeline.text.tokenizer import Tokens
from tests.data_pipeline.inputs import MakeMix
from tests.support.fates_in_memory import mark_near_duplicates


def make_documents(count: int, length: int, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100_000, length).astype(np.uint32) for _ in range(count)]


def changed(tokens: Tokens, share: float) -> Tokens:
    """Return the tokens with every n-th one replaced."""
    result = tokens.copy()
    result[:: round(1 / share)] += 1
    return result


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_a_window_hash_depends_on_its_tokens_alone(values: list[int], length: int) -> None:
    tokens = np.array(values, dtype=np.uint32)
    hashes = window_hashes(tokens, length)
    assert len(hashes) == max(len(values) - length + 1, 0)
    by_window: dict[tuple[int, ...], int] = {}
    for start, found in enumerate(hashes.tolist()):
        assert by_window.setdefault(tuple(values[start : start + length]), found) == found
    assert len(set(by_window.values())) == len(by_window)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    (document,) = make_documents(1, 5000)
    for share in (0.002, 0.02, 0.05):
        other = changed(document, share)
        one, two = (set(window_hashes(d, 5).tolist()) for d in (document, other))
        exact = len(one & two) / len(one | two)
        pair = minhash_signatures([document, other])
        assert float((pair[0] == pair[1]).mean()) == pytest.approx(
            exact, abs=0.13
        )  # 3 sigma of 128 draws


def test_signatures_do_not_depend_on_the_documents_beside_them() -> None:
    documents = [
        *make_documents(5, 300),
        np.array([7], dtype=np.uint32),
        *make_documents(3, 4, seed=1),
    ]
    together = minhash_signatures(documents)
    assert all(
        (minhash_signatures([document]) == row).all()
        for document, row in zip(documents, together, strict=True)
    )


def test_the_first_of_near_copies_is_kept_and_none_if_one_is_held_out() -> None:
    a, b, c, d = make_documents(4, 1000)
    documents = [a, b, changed(a, 0.01), c, changed(b, 0.01), changed(a, 0.02), d, changed(d, 0.2)]
    fates = np.zeros(len(documents), np.uint8)
    fates[4] = Fate.HELD_OUT  # the near copy of b
    parts = [minhash_signatures(documents[:3]), minhash_signatures(documents[3:])]
    mark_near_duplicates(fates, parts, 0.8)
    near = Fate.NEAR_DUPLICATE
    assert fates.tolist() == [
        Fate.TRAIN,
        near,
        near,
        Fate.TRAIN,
        Fate.HELD_OUT,
        near,
        Fate.TRAIN,
        Fate.TRAIN,
    ]


def test_documents_that_share_little_are_all_kept() -> None:
    documents = make_documents(300, 200)
    fates = np.zeros(300, np.uint8)
    mark_near_duplicates(fates, [minhash_signatures(documents)], 0.8)
    assert not fates.any()


def _prose(rng: np.random.Generator, words: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(0, 10_000, words))


def test_a_build_drops_near_copies_across_sources(make_mix: MakeMix, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [_prose(rng, 200) for _ in range(20)]
    copies = [text + " and one more word" for text in texts[:8]]
    mix = make_mix(
        {"a": texts, "b": [*copies, *(_prose(rng, 200) for _ in range(5))]}, near_duplicates=0.8
    )
    first, second = build(mix, tmp_path / "out", progress=False).sources
    assert (first.documents, first.near_duplicates) == (20, 0)
    assert (second.documents, second.near_duplicates) == (5, 8)
