"""Held-out documents are chosen by their text alone; they and their copies are not trained on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fates.deduplication import held_out_digests
from data_pipeline.parts.salted_digests import salted_digests
from data_pipeline.reading.content_hashes import HASH_DTYPE, Hashes, content_hash
from tests.support.fates_in_memory import decide_fates


def hashes_of(*names: object) -> list[int]:
    return [content_hash(str(name).encode()) for name in names]


def as_array(hashes: list[int]) -> Hashes:
    pairs = [(value >> 64, value & 2**64 - 1) for value in hashes]
    return np.array(pairs, dtype=HASH_DTYPE)


def held(names: list[object], share: float) -> set[object]:
    hashes = as_array(hashes_of(*names))
    digests = salted_digests(hashes["high"], hashes["low"])
    first, last = held_out_digests(int(digests.min()), int(digests.max()), share)
    chosen = set()
    for name, digest in zip(names, digests.tolist(), strict=True):
        if first <= digest <= last:
            chosen.add(name)
    return chosen


def test_the_choice_does_not_depend_on_order_or_on_other_documents() -> None:
    names: list[object] = list(range(1000))
    chosen = held(names, 0.1)
    assert held(names[::-1], 0.1) == chosen
    assert held(names[:500], 0.1) == chosen & set(names[:500])


def test_the_share_is_met_on_average_and_larger_shares_hold_out_more_of_the_same() -> None:
    names: list[object] = list(range(20_000))
    small, large = held(names, 0.05), held(names, 0.2)
    assert abs(len(small) - 1000) < 150 and abs(len(large) - 4000) < 300 and small < large


def test_two_documents_give_one_to_each_side_however_small_or_large_the_share() -> None:
    for share in (1e-9, 0.1, 0.5, 0.999999):
        assert len(held(["a", "b"], share)) == 1


def test_a_single_document_is_trained_on() -> None:
    assert held(["a"], 0.9) == set()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 30)), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        min_size=1,
        max_size=5,
    )
)
def test_every_text_has_exactly_one_fate_across_sources(
    sources: list[tuple[set[int], float]],
) -> None:
    names = [sorted(texts) for texts, _ in sources]
    assigned = decide_fates(
        [as_array(hashes_of(*texts)) for texts in names], [share for _, share in sources]
    )
    trained = [texts[i] for texts, a in zip(names, assigned, strict=True) for i in a.train]
    held_out = [texts[i] for texts, a in zip(names, assigned, strict=True) for i in a.held_out]
    assert len(set(trained)) == len(trained) and len(set(held_out)) == len(held_out)
    assert not set(trained) & set(held_out)
    assert set(trained) | set(held_out) == set().union(*map(set, names))
    for texts, a in zip(names, assigned, strict=True):
        assert len(a.train) + len(a.held_out) + a.num_duplicates + a.num_held_out_copies == len(
            texts
        )
        assert (np.diff(a.train) > 0).all() and (np.diff(a.held_out) > 0).all()


def test_a_copy_in_an_earlier_source_is_dropped_for_a_later_source_that_holds_it_out() -> None:
    first, second = decide_fates(
        [as_array(hashes_of("x", "y")), as_array(hashes_of("x"))], [0.0, 1.0]
    )
    assert first.train.tolist() == [1] and first.num_held_out_copies == 1
    assert second.held_out.tolist() == [0]


def test_of_equal_texts_the_first_source_trains_on_it() -> None:
    first, second = decide_fates(
        [as_array(hashes_of("x", "y")), as_array(hashes_of("z", "y"))], [0.0, 0.0]
    )
    assert (
        first.train.tolist() == [0, 1]
        and second.train.tolist() == [0]
        and second.num_duplicates == 1
    )
