"""A run that follows a schedule is exact at every prefix, pure, and cut nowhere but at phases."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.errors import ConfigError
from data_pipeline.mixture import mixture as mixture_module
from data_pipeline.mixture.ledger import Ledger, Segment, resume_ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.phases import phases_of
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.data_pipeline.mixture.test_mixture import Rows, ids, some_rows

BATCH = 4
"""Rows of a step."""
Numbers = Any


def phase(
    name: str,
    start_step: int,
    stop_step: int,
    weights: Mapping[str, float],
    to_weights: Mapping[str, float] | None = None,
) -> Segment:
    return Segment(
        start_step=start_step,
        stop_step=stop_step,
        weights=weights,
        to_weights=to_weights,
        phase=name,
        max_epochs={},
        mix_hash="",
    )


def shares(parts: list[int]) -> dict[str, float]:
    return {f"s{index}": part / sum(parts) for index, part in enumerate(parts)}


@st.composite
def scheduled_ledgers(draw: st.DrawFn) -> tuple[Rows, Ledger]:
    """Up to four phases over up to seven sources, constant or changing, some of weight 0."""
    num_sources = draw(st.integers(1, 7))
    row_tokens = st.lists(st.integers(1, 64), min_size=1, max_size=9)
    rows = Rows({f"s{index}": draw(row_tokens) for index in range(num_sources)})
    weights = st.lists(st.integers(0, 50), min_size=num_sources, max_size=num_sources).filter(any)
    segments = []
    start = 0
    for number in range(draw(st.integers(1, 4))):
        stop = start + draw(st.integers(1, 50))
        to_weights = shares(draw(weights)) if draw(st.booleans()) else None
        segments.append(phase(f"p{number}", start, stop, shares(draw(weights)), to_weights))
        start = stop
    return rows, Ledger(tuple(segments))


def target_tokens(rows: Rows, segment: Segment, tokens: Numbers) -> Numbers:
    """Return what each source should have given, [sources, prefixes], by adding up small steps.

    The integral of the weights is taken as the sum over 1/8 of a token, with the weight in the
    middle: exact for straight lines, and not the formula under test.
    """
    num_sources = len(rows.source_names)
    first = np.array([segment.weights[name] for name in rows.source_names])
    last = first
    if segment.to_weights is not None:
        last = np.array([segment.to_weights[name] for name in rows.source_names])
    means = [rows.row_tokens(source).mean() for source in range(num_sources)]
    assert segment.stop_step is not None
    num_rows = (segment.stop_step - segment.start_step) * BATCH
    length = num_rows / float(((first + last) / 2 / means).sum())
    middles = (np.arange(int(tokens.max()) * 8) + 0.5) / 8
    part = np.minimum(middles / length, 1.0)
    weights = first[:, None] * (1 - part) + last[:, None] * part
    reached = np.concatenate([np.zeros((num_sources, 1)), np.cumsum(weights, axis=1) / 8], axis=1)
    return reached[:, tokens.astype(int) * 8]


@settings(max_examples=150, deadline=None)
@given(scheduled_ledgers())
def test_every_source_is_within_one_row_of_its_target_at_every_prefix_of_every_phase(
    case: tuple[Rows, Ledger],
) -> None:
    rows, ledger = case
    mixture = Mixture(rows, ledger, 3)
    num_sources = len(rows.source_names)
    longest = max(int(rows.row_tokens(source).max()) for source in range(num_sources))
    for segment in ledger.segments:
        assert segment.stop_step is not None
        batches = []
        for step in range(segment.start_step, segment.stop_step):
            batches.append(mixture.global_batch(step, BATCH))
        sources = np.concatenate([batch.sources for batch in batches])
        tokens = np.concatenate([batch.predicted_tokens for batch in batches])
        drawn = np.zeros((num_sources, len(tokens)))
        drawn[sources, np.arange(len(tokens))] = tokens
        drawn = drawn.cumsum(axis=1)
        # a weight that bends between two of the small steps is off by less than one of them
        slack = 0.02 + 1e-6 * longest
        deviation = np.abs(target_tokens(rows, segment, tokens.cumsum()) - drawn)
        assert deviation.max() <= longest + slack


@settings(max_examples=50, deadline=None)
@given(scheduled_ledgers(), st.integers(0, 2**32))
def test_steps_are_the_same_in_any_order_from_any_instance(
    case: tuple[Rows, Ledger], seed: int
) -> None:
    rows, ledger = case
    num_steps = ledger.segments[-1].stop_step
    assert num_steps is not None
    straight = Mixture(rows, ledger, 3)
    expected = [ids(straight.global_batch(step, BATCH)) for step in range(num_steps)]
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    steps = list(range(num_steps))
    random.Random(seed).shuffle(steps)
    other = Mixture(rows, again, 3)
    for step in steps[:8]:
        assert ids(other.global_batch(step, BATCH)) == expected[step]
        assert ids(Mixture(rows, again, 3).global_batch(step, BATCH)) == expected[step]


def test_snapshots_within_a_linear_change_change_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows({"s0": 13, "s1": 40, "s2": 7})
    changing = phase("change", 0, 60, shares([8, 1, 1]), shares([1, 4, 5]))
    plain = Mixture(rows, Ledger((changing,)), 3)
    expected = [ids(plain.global_batch(step, 10)) for step in range(60)]
    monkeypatch.setattr(mixture_module, "SNAPSHOT_ROWS", 17)
    cut = Mixture(rows, Ledger((changing,)), 3)
    for step in (59, 3, 40, 41, 0, 25):
        assert ids(cut.global_batch(step, 10)) == expected[step]


def test_a_linear_change_reaches_its_end_and_its_mean_is_the_middle() -> None:
    rows = Rows({"s0": [90, 100, 110] * 10, "s1": [40, 50, 60] * 10})
    segment = phase("change", 0, 2000, {"s0": 1.0, "s1": 0.0}, {"s0": 0.2, "s1": 0.8})
    mixture = Mixture(rows, Ledger((segment,)), 3)
    tokens = np.zeros((2000, 2))
    for step in range(2000):
        batch = mixture.global_batch(step, BATCH)
        tokens[step] = np.bincount(batch.sources, weights=batch.predicted_tokens, minlength=2)
    share = tokens[:, 1].sum() / tokens.sum()
    late = tokens[-100:, 1].sum() / tokens[-100:].sum()
    early = tokens[:100, 1].sum() / tokens[:100].sum()
    assert share == pytest.approx(0.4, abs=0.002)
    assert early == pytest.approx(0.02, abs=0.01) and late == pytest.approx(0.78, abs=0.02)


TEXTS = {"ja": make_texts(30, "j"), "en": make_texts(40, "e"), "best": make_texts(20, "b")}
WEIGHTS = {"ja": 0.6, "en": 0.4, "best": 0.0}
SCHEDULE: list[dict[str, Any]] = [
    {"name": "warm", "until_step": 10},
    {"name": "shift", "share": 0.5, "weights": WEIGHTS, "to": {"ja": 0.5, "en": 0.3, "best": 0.2}},
    {"name": "anneal", "share": "rest", "weights": {"ja": 0.3, "en": 0.2, "best": 0.5}},
]


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    return make_mix(TEXTS, weights=WEIGHTS, schedule=SCHEDULE)


def stored(ledger: Ledger) -> dict[str, Any]:
    return json.loads(json.dumps(ledger.to_json()))  # type: ignore[no-any-return]


def starts(ledger: Ledger) -> list[tuple[str, int]]:
    return [(segment.phase, segment.start_step) for segment in ledger.segments]


def test_a_schedule_is_in_the_ledger_from_the_start(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    assert starts(ledger) == [("warm", 0), ("shift", 10), ("anneal", 60)]
    warm, shift, anneal = ledger.segments
    assert warm.weights == WEIGHTS and warm.to_weights is None
    assert shift.to_weights == {"ja": 0.5, "en": 0.3, "best": 0.2} and shift.stop_step == 60
    assert anneal.weights["best"] == 0.5
    assert Ledger.from_json(stored(ledger)) == ledger
    assert stored(ledger)["format_version"] == 3


def test_a_mix_without_a_schedule_has_the_ledger_that_it_always_had(make_mix: MakeMix) -> None:
    plain = make_mix(TEXTS, weights=WEIGHTS)
    for total_steps in (None, 100):
        value = stored(Ledger.start(plain, total_steps=total_steps))
        assert value["format_version"] == 2
        keys = {"start_step", "weights", "max_epochs", "mix_hash", "settings", "rows"}
        assert value["segments"][0].keys() == keys
        assert "schedule" not in value["segments"][0]["settings"]


def test_borders_are_rounded_once(make_mix: MakeMix) -> None:
    thirds = []
    for number in range(3):
        thirds.append({"name": f"p{number}", "share": 1 / 3})
    mix = make_mix(TEXTS, weights=WEIGHTS, schedule=thirds)
    for total_steps in (3, 7, 100, 1001):
        phases = phases_of(mix, total_steps)
        assert phases[-1].stop_step == total_steps
        for number, one in enumerate(phases):
            assert one.stop_step == int((number + 1) * total_steps / 3 + 0.5)


def test_a_run_that_cannot_follow_is_refused_with_every_phase(mix: MixConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        Ledger.start(mix, total_steps=10)
    assert len(caught.value.problems) == 2
    assert "phase 'shift' ends at step 15, but the run has 10 steps" in caught.value.problems[0]
    assert "phase 'anneal' has no step in a run of 10 steps" in caught.value.problems[1]


def test_another_length_moves_phases_to_come_only_if_accepted(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    assert resume_ledger(stored(ledger), mix, 30, accept_change=False, total_steps=100) == ledger
    with pytest.raises(ConfigError) as caught:
        resume_ledger(stored(ledger), mix, 30, accept_change=False, total_steps=200)
    text = str(caught.value)
    assert "phase shift: steps 10 to 60 -> steps 10 to 110 (of 200 steps, 100 before)" in text
    assert "phase anneal: from step 60 on -> from step 110 on" in text
    assert "data.accept_mix_change=true" in text
    longer = resume_ledger(stored(ledger), mix, 30, accept_change=True, total_steps=200)
    assert starts(longer) == [("warm", 0), ("shift", 10), ("shift", 30), ("anneal", 110)]
    assert longer.segments[:2] == ledger.segments[:2]
    assert longer.segments[2].weights["best"] == pytest.approx(0.2 * 20 / 100)
    again = resume_ledger(stored(longer), mix, 40, accept_change=False, total_steps=200)
    assert again == longer


def test_only_a_longer_constant_last_phase_needs_no_word(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    with pytest.raises(ConfigError, match="phase anneal"):
        resume_ledger(stored(ledger), mix, 70, accept_change=False, total_steps=300)
    fixed = dataclasses.replace(
        mix,
        schedule=(
            dataclasses.replace(mix.schedule[0]),
            dataclasses.replace(mix.schedule[1], share=None, until_step=60),
            mix.schedule[2],
        ),
    )
    ledger = Ledger.start(fixed, total_steps=100)
    assert resume_ledger(stored(ledger), fixed, 70, accept_change=False, total_steps=300) == ledger


def test_an_accepted_edit_replaces_the_future_and_nothing_else(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    anneal = dataclasses.replace(mix.schedule[2], weights={"ja": 0.5, "en": 0.5})
    edited = dataclasses.replace(mix, schedule=(*mix.schedule[:2], anneal))
    with pytest.raises(ConfigError) as caught:
        resume_ledger(stored(ledger), edited, 30, accept_change=False, total_steps=100)
    assert "since step 0 of this run" in str(caught.value)
    assert "schedule[anneal].weights" in str(caught.value)
    now = resume_ledger(stored(ledger), edited, 30, accept_change=True, total_steps=100)
    assert starts(now) == [("warm", 0), ("shift", 10), ("shift", 30), ("anneal", 60)]
    assert now.segments[:2] == ledger.segments[:2]
    assert now.segments[3].weights == {"ja": 0.5, "en": 0.5, "best": 0.0}
    plain = dataclasses.replace(mix, schedule=())
    without = resume_ledger(stored(ledger), plain, 30, accept_change=True, total_steps=100)
    assert starts(without) == [("warm", 0), ("shift", 10), ("", 30)]


def test_a_source_of_a_phase_to_come_may_still_change(mix: MixConfig) -> None:
    rows = {"ja": "1", "en": "2", "best": "3"}
    ledger = Ledger.start(mix, rows, 100)
    other = rows | {"best": "4"}
    changed = resume_ledger(stored(ledger), mix, 5, accept_change=True, rows=other, total_steps=100)
    assert changed.segments[-1].rows["best"] == "4"
    with pytest.raises(ConfigError, match="source 'best' was trained on and has other rows"):
        resume_ledger(stored(ledger), mix, 20, accept_change=True, rows=other, total_steps=100)


def raised(segment: Segment, planned: Mapping[str, float]) -> dict[str, float]:
    """Give English ten points of the Japanese share."""
    return {**planned, "en": planned["en"] + 0.1, "ja": planned["ja"] - 0.1}


def test_an_adjustment_holds_in_all_phases_to_come_and_is_made_once(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    now = ledger.adjust(mix, 35, raised)
    assert starts(now) == [("warm", 0), ("shift", 10), ("shift", 35), ("anneal", 60)]
    assert now.segments[:2] == ledger.segments[:2]
    assert now.segments[2].weights["en"] == pytest.approx(0.35 + 0.1)
    assert now.segments[2].to_weights is not None
    assert now.segments[2].to_weights["en"] == pytest.approx(0.4)
    assert now.segments[3].weights["en"] == pytest.approx(0.3)
    again = Ledger.from_json(stored(now))
    for step in (35, 36, 59, 60, 99):
        assert again.adjust(mix, step, raised) is again
    back = now.adjust(mix, 50, lambda segment, planned: planned)
    assert back.segments[-1].weights == ledger.segments[-1].weights


def test_mean_weights_are_those_of_the_steps_asked_for(mix: MixConfig) -> None:
    ledger = Ledger.start(mix, total_steps=100)
    assert ledger.mean_weights(0, 10) == pytest.approx(WEIGHTS)
    assert ledger.mean_weights(10, 60)["best"] == pytest.approx(0.1)
    whole = (10 * 0.0 + 50 * 0.1 + 40 * 0.5) / 100
    assert ledger.mean_weights(0, 100)["best"] == pytest.approx(whole)
