"""Work is divided evenly, without gaps in a span, and every item once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.offline.pieces import (
    FORMAT_VERSION,
    IDENTITY_FILE,
    kept_pieces,
    next_spans,
    partial_folder,
)


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


@pytest.mark.parametrize("stated", ["tensors:new+old", "old"], ids=["of now", "of before"])
def test_pieces_are_gone_on_with_by_the_hash_of_the_model_that_they_state(
    tmp_path: Path, stated: str
) -> None:
    alone: Any = SimpleNamespace(on_first=lambda action: action())
    out = tmp_path / "out.jsonl"
    folder = partial_folder(out)
    identity = {"command": "replay", "model": "tensors:new+old"}
    folder.mkdir()
    (folder / f"texts.0-4.{'0' * 32}.json").write_text("[]")
    work = {"format_version": FORMAT_VERSION, **identity, "model": stated}
    (folder / IDENTITY_FILE).write_text(json.dumps(work))
    others = ["tensors:new+other", "tensors:x+y"]
    if stated != "old":
        others.append("tensors:other+old")
    for model in others:
        changed = kept_pieces(out, identity | {"model": model}, alone)
        with pytest.raises(ConfigError, match=f'model was "{re.escape(stated)}"'), changed:
            pytest.fail("pieces of another model were taken")
    with kept_pieces(out, identity, alone):
        pass
    assert not folder.exists()
