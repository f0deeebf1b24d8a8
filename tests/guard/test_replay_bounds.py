"""Whatever the guard gives or takes, every phase of the mix keeps its bounds on languages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.guard.ladder import GuardState
from cpt.guard.replay_share import ReplayShares
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.mixture.ledger import Ledger, Segment
from tests.guard.test_plan_shift import ANNEAL, RAISED
from tests.guard.test_replay_share import shares_of

LANGUAGE_OF = {"ja_web": "ja", "ja_books": "ja", "en_web": "en", "en_books": "en", "code": "code"}
WEIGHTS = {"ja_web": 0.5, "ja_books": 0.1, "en_web": 0.2, "en_books": 0.1, "code": 0.1}
REPLAYED = ("en_web", "en_books", "code")
DATA: Any = SimpleNamespace(
    source_names=tuple(WEIGHTS), row_tokens=lambda _: np.full(50, 10), seq_len=10
)
STEPS = 120
FRACTIONS = st.floats(0, 1)


@st.composite
def plans(draw: Any) -> dict[str, float]:
    """Return weights of the sources; some of the replayed ones may be left out."""
    amounts = {"ja_web": draw(st.floats(0.05, 1)), "ja_books": draw(FRACTIONS)}
    for name in REPLAYED:
        amounts[name] = draw(st.one_of(st.just(0.0), FRACTIONS))
    total = math.fsum(amounts.values())
    return {name: amount / total for name, amount in amounts.items()}


def share_of(language: str, weights: Mapping[str, float]) -> float:
    return math.fsum(weights[name] for name, of in LANGUAGE_OF.items() if of == language)


@st.composite
def phases(draw: Any, number: int) -> SchedulePhase:
    """Return a phase whose bounds its own weights keep, often just so."""
    weights = draw(plans())
    ends = [weights]
    if draw(st.booleans()):
        ends.append(draw(plans()))
    bounds = {}
    for language in ("ja", "en", "code"):
        shares = [share_of(language, end) for end in ends]
        slack = draw(st.sampled_from([0.0, 0.02, 1.0]))
        bounds[language] = LanguageLimits(
            min_share=max(0.0, min(shares) - slack), max_share=min(1.0, max(shares) + slack)
        )
    return SchedulePhase(
        name=f"phase {number}",
        until_step=40 * (number + 1) if number < 2 else None,
        share=None if number < 2 else "rest",
        weights=weights,
        to=ends[1] if len(ends) > 1 else {},
        languages=bounds,
    )


def mix_of(schedule: tuple[SchedulePhase, ...]) -> MixConfig:
    sources = []
    for name, weight in WEIGHTS.items():
        sources.append(
            SourceConfig(
                name=name, language=LANGUAGE_OF[name], domain="web", format="mock", weight=weight
            )
        )
    domains = (
        GuardDomain(name="english", language="en", sources=("en_web", "en_books")),
        GuardDomain(name="code", language="code", sources=("code",)),
    )
    return MixConfig(
        seq_len=8,
        seed=3,
        sources=tuple(sources),
        guard=GuardConfig(domains=domains),
        schedule=schedule,
    )


@st.composite
def states(draw: Any) -> GuardState:
    """Return what a guard of either controller may have asked for, at any place of any plan."""
    planned = draw(plans())
    return GuardState(
        planned={name: planned[name] for name in REPLAYED},
        replay=draw(st.dictionaries(st.sampled_from(REPLAYED), FRACTIONS)),
        shares=draw(st.dictionaries(st.sampled_from(["english", "code"]), FRACTIONS)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    schedule=st.tuples(phases(0), phases(1), phases(2)),
    state=states(),
    step=st.integers(0, STEPS - 1),
    least_replay=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_ledger_takes_whatever_the_guard_does_to_any_schedule(
    schedule: tuple[SchedulePhase, ...], state: GuardState, step: int, least_replay: float
) -> None:
    mix = mix_of(schedule)
    replay = ReplayShares(mix, DATA, 0.75, least_replay)

    def adjusted(segment: Segment, planned: Mapping[str, float]) -> Mapping[str, float]:
        weights = replay.at(planned, segment.languages()).weights(state)
        for name in REPLAYED:
            assert weights[name] >= least_replay * planned[name] - 1e-9
        for language, bounds in segment.languages().items():
            share = share_of(language, weights)
            assert bounds["min_share"] - 1e-6 <= share <= bounds["max_share"] + 1e-6
        most = max(0.75, 1 - share_of("ja", planned))
        assert 1 - share_of("ja", weights) <= most + 1e-6
        return weights

    # a ledger refuses weights that break a bound, are negative, or do not sum to 1
    Ledger.start(mix, total_steps=STEPS).adjust(mix, step, adjusted)


def bounds(language: str, least: float, most: float) -> dict[str, dict[str, float]]:
    return {language: {"min_share": least, "max_share": most}}


def test_raise_goes_as_far_as_the_ceiling_of_its_language_in_a_later_phase() -> None:
    weights = shares_of().at(ANNEAL, bounds("en", 0.0, 0.35)).weights(RAISED)
    assert weights["en_web"] == pytest.approx(0.35) and weights["code"] == pytest.approx(0.1)
    planned_at_it = shares_of().at(ANNEAL, bounds("en", 0.0, 0.3)).weights(RAISED)
    assert planned_at_it == pytest.approx(ANNEAL)


def test_replay_is_lowered_as_far_as_its_floor_and_the_ceiling_of_the_main_language() -> None:
    state = GuardState(replay={"en_web": 0.1}, planned={"en_web": 0.2, "code": 0.1})
    shares = shares_of(least_replay=0.5)
    assert shares.at(ANNEAL, {}).weights(state)["en_web"] == pytest.approx(0.2)
    floor = shares.at(ANNEAL, bounds("en", 0.25, 1.0)).weights(state)
    assert floor["en_web"] == pytest.approx(0.25)
    ceiling = shares.at(ANNEAL, bounds("ja", 0.0, 0.62)).weights(state)
    assert ceiling["en_web"] == pytest.approx(0.28) and ceiling["code"] == pytest.approx(0.1)


def test_a_language_that_lost_is_not_lowered_further_for_one_that_gained_too_much() -> None:
    state = GuardState(replay={"en_web": 0.7, "code": 0.05}, planned={"en_web": 0.2, "code": 0.1})
    floor = bounds("ja", 0.4, 1.0)
    weights = shares_of(least_replay=0.5).at({**ANNEAL, "en_web": 0.2, "ja_web": 0.4}, floor)
    assert weights.weights(state)["code"] == pytest.approx(0.05)
    assert weights.weights(state)["en_web"] == pytest.approx(0.55)
