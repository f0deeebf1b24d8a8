"""Work is divided evenly, without gaps in a span, and every item once."""

from __future__ import annotations

import pytest

from cpt.offline.pieces import next_spans


def rounds_of(missing: list[int], world_size: int, save_every: int) -> list[list[range]]:
    """Return all rounds, as if every one were done in full."""
    rounds = []
    while missing:
        spans = next_spans(missing, world_size, save_every)
        rounds.append(spans)
        done = {item for span in spans for item in span}
        missing = [item for item in missing if item not in done]
    return rounds


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("save_every", [1, 4, 64])
@pytest.mark.parametrize("missing", [list(range(50)), [0, 1, 2, 7, 8, 20, *range(30, 61)]])
def test_every_item_is_computed_once(world_size: int, save_every: int, missing: list[int]) -> None:
    found = []
    for spans in rounds_of(missing, world_size, save_every):
        assert len(spans) == world_size and max(map(len, spans)) <= save_every
        for span in spans:
            found += list(span)
    assert sorted(found) == missing


def test_few_items_are_spread_over_all_ranks() -> None:
    assert next_spans(list(range(8)), 8, 64) == [range(n, n + 1) for n in range(8)]
    assert [len(span) for span in next_spans(list(range(9)), 4, 64)] == [3, 3, 3, 0]


def test_rounds_are_even() -> None:
    lengths = [[len(span) for span in spans] for spans in rounds_of(list(range(130)), 2, 64)]
    assert lengths == [[33, 33], [32, 32]]


def test_a_span_ends_where_items_are_done() -> None:
    assert next_spans([4, 5, 9, 10, 11], 2, 64) == [range(4, 6), range(9, 12)]


def test_nothing_missing_is_no_work() -> None:
    assert rounds_of([], 4, 8) == []
