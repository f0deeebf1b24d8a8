"""A jump lands exactly where the walk row by row would."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import mixture as module
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.store.packing import Integers


class Rows:
    def __init__(self, tokens: Sequence[Integers]) -> None:
        self.source_names = tuple(f"s{number}" for number in range(len(tokens)))
        self._tokens = tokens

    def row_tokens(self, source: int) -> Integers:
        return self._tokens[source]


def make_rows(seed: int, counts: Sequence[int], low: int, high: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows([rng.integers(low, high + 1, count) for count in counts])


def make_ledger(rows: Rows, *weights: Sequence[float], border: int = 60) -> Ledger:
    return Ledger(
        tuple(
            Segment(
                start_step=number * border,
                weights={
                    n: w / sum(values) for n, w in zip(rows.source_names, values, strict=True)
                },
                max_epochs={},
                mix_hash="",
            )
            for number, values in enumerate(weights)
        )
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.floats(0.002, 1), min_size=1, max_size=9),
    low=st.integers(1, 4096),
    data=st.data(),
)
def test_a_jump_equals_the_walk_bit_for_bit(
    seed: int, weights: list[float], low: int, data: st.DataObject
) -> None:
    counts = data.draw(
        st.lists(st.integers(50, 3000), min_size=len(weights), max_size=len(weights))
    )
    rows = make_rows(seed, counts, low, 4096)
    other = data.draw(st.permutations(weights))
    ledger = make_ledger(rows, weights, other)
    jumped, walked = Mixture(rows, ledger, 5), Mixture(rows, ledger, 5)
    for step in data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "JUMP_ROWS", 2000)
            there = jumped.position(step, 128)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "JUMP_ROWS", 1 << 60)
            assert there == walked.position(step, 128)


def test_blocks_that_do_not_meet_are_walked_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(3, [4000, 900, 77], 100, 4096)
    ledger = make_ledger(rows, [0.7, 0.25, 0.05])
    expected = Mixture(rows, ledger, 1).position(10, 1000)
    monkeypatch.setattr(module, "JUMP_ROWS", 2000)
    monkeypatch.setattr("data_pipeline.jump.BURN_IN", 0)
    assert Mixture(rows, ledger, 1).position(10, 1000) == expected


def test_batches_after_a_jump_are_those_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(4, [5000, 5000, 300], 3000, 4096)
    ledger = make_ledger(rows, [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], border=90)
    cold = Mixture(rows, ledger, 1)
    steps = (100, 89, 90, 31, 99)
    monkeypatch.setattr(module, "JUMP_ROWS", 1 << 60)
    walked = Mixture(rows, ledger, 1)
    expected = [walked.global_batch(step, 256).chain_hash("") for step in steps]
    monkeypatch.setattr(module, "JUMP_ROWS", 4000)
    assert [cold.global_batch(step, 256).chain_hash("") for step in steps] == expected


def test_any_step_of_a_ten_billion_token_plan_is_there_within_a_second() -> None:
    num_rows = 10_000_000_000 // 4096
    shares = [0.13, 0.10, 0.15, 0.12, 0.13, 0.12, 0.13, 0.12]
    rows = make_rows(0, [int(num_rows * share * 0.7) for share in shares], 4076, 4096)
    ledger = make_ledger(rows, shares)
    seconds: list[float] = []
    while (
        len(seconds) < 5 and min(seconds, default=1) >= 1
    ):  # the machine may be shared: the best of five
        start = time.perf_counter()
        Mixture(rows, ledger, 1).global_batch(num_rows // 256 - 1, 256)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, seconds
