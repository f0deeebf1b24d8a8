"""The mixture is exact at every prefix and a pure function of (ledger, seed, step)."""

from __future__ import annotations

import hashlib
import random
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture import mixture as mixture_module
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import GlobalBatch, Mixture, epoch_order
from data_pipeline.store.hashing import splitmix64
from data_pipeline.store.packing import Integers

GOLDEN_ORDER = [1, 7, 5, 0, 9, 3, 8, 6, 11, 10, 2, 4]
GOLDEN_CHAIN = "11409b2e8bf87809ee7c9dbd7f853f1b7a4b75b31e2a753c2773e391c34566ab"


class Rows:
    """Row sizes without a build behind them."""

    def __init__(self, row_tokens: dict[str, list[int]]) -> None:
        self.source_names = tuple(row_tokens)
        self._row_tokens = [np.array(tokens, dtype=np.int64) for tokens in row_tokens.values()]

    def row_tokens(self, source: int) -> Integers:
        return self._row_tokens[source]


def segment(
    weights: dict[str, float], start_step: int = 0, max_epochs: dict[str, float] | None = None
) -> Segment:
    return Segment(start_step=start_step, weights=weights, max_epochs=max_epochs or {}, mix_hash="")


def some_rows(sizes: dict[str, int], seq_len: int = 100) -> Rows:
    return Rows(
        {
            name: [1 + (i * 37 + len(name)) % seq_len for i in range(count)]
            for name, count in sizes.items()
        }
    )


def ids(batch: GlobalBatch) -> list[tuple[int, int, int]]:
    return list(
        zip(batch.sources.tolist(), batch.rows.tolist(), batch.epochs.tolist(), strict=True)
    )


def worst_deviation(rows: Rows, weights: list[float], count: int) -> float:
    """Largest distance of a source from its target over all prefixes, in units of the largest
    row.
    """
    ledger = Ledger((segment(dict(zip(rows.source_names, weights, strict=True))),))
    batch = Mixture(rows, ledger, 0).global_batch(0, count)
    given_tokens = np.zeros((len(weights), count))
    given_tokens[batch.sources, np.arange(count)] = batch.predicted_tokens
    given_tokens = given_tokens.cumsum(axis=1)
    target = np.array(weights)[:, None] * given_tokens.sum(axis=0)
    return float(
        np.abs(target - given_tokens).max()
        / max(rows.row_tokens(s).max() for s in range(len(weights)))
    )


@st.composite
def mixes(draw: st.DrawFn) -> tuple[Rows, list[float]]:
    parts = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=16))
    sizes = [draw(st.lists(st.integers(1, 64), min_size=1, max_size=12)) for _ in parts]
    return Rows({f"s{i}": tokens for i, tokens in enumerate(sizes)}), [
        part / sum(parts) for part in parts
    ]


@settings(max_examples=120, deadline=None)
@given(mixes())
def test_every_prefix_is_within_one_packed_row_of_every_target(
    mix: tuple[Rows, list[float]],
) -> None:
    assert worst_deviation(*mix, count=400) <= 1 + 1e-9


@st.composite
def ledgers_with_a_floor(draw: st.DrawFn) -> tuple[Rows, Ledger, float]:
    """Up to four segments of other weights, steps and sources, all of which keep the same floor of
    English.
    """
    sizes = draw(
        st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=9), min_size=2, max_size=7)
    )
    names = [f"{'en' if i % 2 else 'ja'}{i}" for i in range(len(sizes))]
    english, others = names[1::2], names[::2]
    floor, segments, start = draw(st.floats(0.05, 0.6)), [], 0
    labels = {
        "sources": {n: {"language": n[:2]} for n in names},
        "languages": {"en": {"min_share": floor}},
    }
    for _ in range(draw(st.integers(1, 4))):
        share = draw(st.floats(floor, 1.0))
        weights = {name: 0.0 for name in names}
        for group, total in ((english, share), (others, 1 - share)):
            parts = [draw(st.integers(0, 9)) for _ in group]
            parts = parts if any(parts) else [1] * len(group)
            weights |= {
                name: total * part / sum(parts) for name, part in zip(group, parts, strict=True)
            }
        segments.append(
            Segment(start_step=start, weights=weights, max_epochs={}, mix_hash="", settings=labels)
        )
        start += draw(st.integers(1, 60))
    return Rows(dict(zip(names, sizes, strict=True))), Ledger(tuple(segments)), floor


@settings(max_examples=60, deadline=None)
@given(ledgers_with_a_floor())
def test_a_language_has_its_floor_at_every_prefix_of_all_segments(
    case: tuple[Rows, Ledger, float],
) -> None:
    rows, ledger, floor = case
    mixture = Mixture(rows, ledger, 3)
    batches = [mixture.global_batch(step, 2) for step in range(ledger.segments[-1].start_step + 60)]
    tokens = np.concatenate([batch.predicted_tokens for batch in batches])
    english = np.concatenate([batch.sources for batch in batches]) % 2 == 1
    missing = floor * np.cumsum(tokens) - np.cumsum(tokens * english)
    longest = max(int(rows.row_tokens(source).max()) for source in range(len(rows.source_names)))
    assert missing.max() <= (ledger.slack_rows("en") + 1e-6) * longest


def test_a_large_source_beside_small_ones_stays_within_one_row_where_largest_deficit_does_not() -> (
    None
):
    weights = [0.855, 0.093, 0.048, 0.004]
    rows = Rows({f"s{i}": [4096] * 5 for i in range(4)})
    assert worst_deviation(rows, weights, 2000) <= 1
    chosen, worst = np.zeros(4), 0.0
    for count in range(2000):
        chosen[np.argmax(np.array(weights) * count - chosen)] += 1
        worst = max(worst, float(np.abs(np.array(weights) * (count + 1) - chosen).max()))
    assert worst > 1.4


def test_long_japanese_and_short_english_rows_share_tokens_equally() -> None:
    rows = Rows({"ja": [1000] * 50, "en": [200] * 50})
    batch = Mixture(rows, Ledger((segment({"ja": 0.5, "en": 0.5}),)), 0).global_batch(0, 600)
    tokens = np.bincount(batch.sources, weights=batch.predicted_tokens)
    assert abs(tokens[0] - tokens[1]) <= 1000


def test_any_order_of_steps_and_any_instance_gives_the_same_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixture_module, "SNAPSHOT_ROWS", 64)
    rows = some_rows({"a": 13, "b": 40, "c": 7})
    ledger = Ledger(
        (segment({"a": 0.2, "b": 0.5, "c": 0.3}), segment({"a": 0.6, "c": 0.4}, start_step=17))
    )
    straight = Mixture(rows, ledger, 3)
    expected = [ids(straight.global_batch(step, 10)) for step in range(60)]
    steps = list(range(60)) * 3
    random.Random(0).shuffle(steps)
    other = Mixture(rows, ledger, 3)
    for step in steps:
        assert ids(other.global_batch(step, 10)) == expected[step]
    other.global_batch(5, 16)
    assert ids(other.global_batch(59, 10)) == expected[59]


def test_batch_size_only_cuts_the_same_stream_differently() -> None:
    rows, ledger = some_rows({"a": 13, "b": 40}), Ledger((segment({"a": 0.4, "b": 0.6}),))
    small, large = Mixture(rows, ledger, 3), Mixture(rows, ledger, 3)
    stream = [row for step in range(12) for row in ids(small.global_batch(step, 5))]
    assert stream == [row for step in range(3) for row in ids(large.global_batch(step, 20))]


def test_order_of_sources_in_the_mix_does_not_matter() -> None:
    sizes = {"a": 13, "b": 40, "c": 7}
    weights = {"a": 0.25, "b": 0.5, "c": 0.25}
    forward = Mixture(some_rows(sizes), Ledger((segment(weights),)), 3).global_batch(0, 200)
    names = dict(reversed(sizes.items()))
    backward = Mixture(some_rows(names), Ledger((segment(weights),)), 3).global_batch(0, 200)
    assert [2 - source for source in backward.sources] == forward.sources.tolist()
    assert np.array_equal(backward.rows, forward.rows)


def test_no_row_is_lost_or_repeated_within_an_epoch_even_across_segments() -> None:
    sizes = {"a": 11, "b": 30}
    ledger = Ledger((segment({"a": 0.5, "b": 0.5}), segment({"a": 0.1, "b": 0.9}, start_step=7)))
    mixture = Mixture(some_rows(sizes), ledger, 3)
    drawn = [row for step in range(40) for row in ids(mixture.global_batch(step, 9))]
    for source, count in enumerate(sizes.values()):
        in_order = [(row, epoch) for s, row, epoch in drawn if s == source]
        assert [epoch for _, epoch in in_order] == [i // count for i in range(len(in_order))]
        for epoch in range(len(in_order) // count):
            assert sorted(row for row, e in in_order if e == epoch) == list(range(count))


def test_epochs_sources_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(epoch_order(50, seed, name, epoch).tolist())
        for seed in (1, 2)
        for name in "ab"
        for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_the_order_never_changes_between_versions() -> None:
    assert epoch_order(12, 1234, "ja_web", 0).tolist() == GOLDEN_ORDER


def test_order_of_an_epoch_is_that_of_its_keyed_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "_BLOCK_ROWS", 64)
    digest = hashlib.sha256(b"7:en:3").digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    expected = np.argsort(splitmix64(np.arange(1000, dtype=np.uint64) ^ key))
    assert np.array_equal(epoch_order(1000, 7, "en", 3), expected)


def test_order_of_an_epoch_takes_four_bytes_a_row_and_twelve_while_it_is_made() -> None:
    num_rows = 4_000_000
    tracemalloc.start()
    try:
        order = epoch_order(num_rows, 0, "ja", 0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    blocks = 5 * 8 * mixture_module._BLOCK_ROWS  # what is worked on at once
    assert order.nbytes == 4 * num_rows
    assert kept < 4.1 * num_rows
    assert peak < 12 * num_rows + blocks


def test_the_hash_chain_never_changes_between_versions() -> None:
    mixture = Mixture(some_rows({"a": 13, "b": 40}), Ledger((segment({"a": 0.4, "b": 0.6}),)), 1234)
    chain = ""
    for step in range(20):
        chain = mixture.global_batch(step, 16).chain_hash(chain)
    assert chain == GOLDEN_CHAIN


def test_a_source_beyond_its_epochs_is_refused_by_name_and_step() -> None:
    rows = Rows({"a": [10] * 8, "b": [10] * 100})
    mixture = Mixture(rows, Ledger((segment({"a": 0.5, "b": 0.5}, max_epochs={"a": 1.5}),)), 0)
    for step in range(6):
        mixture.global_batch(step, 4)
    with pytest.raises(
        DataError, match=r"source 'a': step 6 asks for epoch 1.75, max_epochs is 1.5"
    ):
        mixture.global_batch(6, 4)
    assert mixture.position(20, 4).drawn_rows == (40, 40)


def test_a_source_of_weight_0_is_never_drawn() -> None:
    mixture = Mixture(some_rows({"a": 5, "b": 5}), Ledger((segment({"a": 1.0, "b": 0.0}),)), 0)
    assert set(mixture.global_batch(0, 50).sources.tolist()) == {0}


def test_a_weight_on_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"source 'b' has weight 0.5 but no training rows"):
        Mixture(Rows({"a": [1], "b": []}), Ledger((segment({"a": 0.5, "b": 0.5}),)), 0)
    with pytest.raises(ConfigError, match="source 'c' is not in the build"):
        Mixture(Rows({"a": [1], "b": [1]}), Ledger((segment({"a": 0.5, "c": 0.5}),)), 0)


def test_a_step_a_billion_tokens_away_is_there_within_three_seconds() -> None:
    rows = some_rows({f"s{i}": 3000 for i in range(8)}, seq_len=8192)
    mixture = Mixture(rows, Ledger((segment({f"s{i}": 0.125 for i in range(8)}),)), 0)
    start = time.perf_counter()
    mixture.global_batch(1000, 256)
    assert time.perf_counter() - start < 3.0
