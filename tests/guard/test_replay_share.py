"""Replay moves at the cost of the main language alone, and within every limit of the mix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.config import GuardSection
from cpt.guard.decision import decide
from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.replay_share import EPOCH_MARGIN, ReplayShares
from cpt.guard.yardstick import Evidence, Reading
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.traces_config import TraceDomain

WEIGHTS = {"ja_web": 0.6, "ja_books": 0.1, "en_web": 0.2, "code": 0.1}
LANGUAGES = {"ja_web": "ja", "ja_books": "ja", "en_web": "en", "code": "code"}
SERVING = {"english": ("en_web",), "japanese": ("ja_web",), "code_and_web": ("code", "en_web")}
ROW_TOKENS = 10
NUM_ROWS = 50


def shares_of(
    *,
    max_epochs: dict[str, float] | None = None,
    min_share: float = 0.0,
    main_max_share: float = 1.0,
    english: tuple[float, float] = (0.0, 1.0),
    least_replay: float = 1.0,
) -> ReplayShares:
    """Return the shares of a mix that is for Japanese and replays English and code.

    Args:
        max_epochs: Epochs by source.
        min_share: Floor of Japanese.
        main_max_share: Ceiling of Japanese.
        english: Floor and ceiling of English.
        least_replay: See `ReplayShares`.
    """
    sources = []
    for name, weight in WEIGHTS.items():
        source = SimpleNamespace(
            name=name,
            language=LANGUAGES[name],
            weight=weight,
            max_epochs=(max_epochs or {}).get(name),
        )
        sources.append(source)
    mix: Any = SimpleNamespace(
        sources=tuple(sources),
        languages={
            "ja": SimpleNamespace(min_share=min_share, max_share=main_max_share),
            "en": SimpleNamespace(min_share=english[0], max_share=english[1]),
        },
        serving_sources=lambda: SERVING,
    )
    data: Any = SimpleNamespace(
        source_names=tuple(WEIGHTS),
        row_tokens=lambda _: np.full(NUM_ROWS, ROW_TOKENS),
        seq_len=ROW_TOKENS,
    )
    return ReplayShares(mix, data, 0.75, least_replay)


def limits_of(
    shares: ReplayShares,
    state: GuardState | None = None,
    *,
    rows_left: int = 0,
    rows_drawn: int = 0,
) -> LeverLimits:
    """Return the limits when so many rows of the run are left."""
    position = SimpleNamespace(drawn_rows=[rows_drawn] * len(WEIGHTS))
    mixture: Any = SimpleNamespace(position=lambda batch, batch_size: position)
    return shares.limits(state or GuardState(), SERVING, mixture, 0, rows_left, 1)


def largest_share(shares: ReplayShares, rows_left: int, rows_drawn: int = 0) -> float:
    """Return the largest share of English when so many rows of the run are left."""
    limits = limits_of(shares, rows_left=rows_left, rows_drawn=rows_drawn)
    largest = limits.shares["english"][1]
    assert limits.sources["en_web"].largest == pytest.approx(largest)
    return largest


def test_main_language_gives_what_replay_gains_in_proportion_to_its_sources() -> None:
    expected = {"ja_web": 0.48, "ja_books": 0.08, "en_web": 0.34, "code": 0.1}
    assert shares_of().weights(GuardState(shares={"english": 0.34})) == pytest.approx(expected)
    assert shares_of().weights(GuardState(replay={"en_web": 0.34})) == pytest.approx(expected)


def mix_with_a_source_that_is_only_measured(
    *, phase_weight: float = 0.0, traces: tuple[str, ...] = ()
) -> MixConfig:
    """Return a mix with a held-out English source of weight 0.

    Args:
        phase_weight: Its weight in a later phase.
        traces: Sources that serve a domain of own traces.
    """
    sources = []
    for name, weight in {**WEIGHTS, "licensed": 0.0}.items():
        language = LANGUAGES.get(name, "en")
        sources.append(SourceConfig(name=name, language=language, domain="web", weight=weight))
    later = {**WEIGHTS, "ja_web": 0.6 - phase_weight, "licensed": phase_weight}
    phase = SchedulePhase(name="last", share="rest", weights=later)
    domains = (
        GuardDomain(name="english", language="en", sources=("en_web", "licensed")),
        GuardDomain(name="other", language="en", sources=("licensed",)),
    )
    own = TraceDomain(name="math", language="en", path="math.jsonl", sources=traces)
    return MixConfig(
        seq_len=ROW_TOKENS,
        seed=1,
        sources=tuple(sources),
        schedule=(phase,) if phase_weight else (),
        guard=GuardConfig(domains=domains, traces=(own,)),
    )


def shares_of_mix(mix: MixConfig) -> ReplayShares:
    data: Any = SimpleNamespace(
        source_names=tuple(source.name for source in mix.sources),
        row_tokens=lambda _: np.full(NUM_ROWS, ROW_TOKENS),
        seq_len=ROW_TOKENS,
    )
    return ReplayShares(mix, data, 0.75)


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
@pytest.mark.parametrize("is_named", [False, True])
def test_source_of_weight_0_is_replayed_only_for_a_domain_that_names_it_for_that(
    controller: Any, is_named: bool
) -> None:
    traces = ("licensed",) if is_named else ("code",)
    shares = shares_of_mix(mix_with_a_source_that_is_only_measured(traces=traces))
    position = SimpleNamespace(drawn_rows=[0] * 5)
    mixture: Any = SimpleNamespace(position=lambda batch, batch_size: position)
    settings = GuardSection(interval_steps=10, controller=controller)
    state = GuardState()
    for _ in range(8):
        limits = shares.limits(state, ["english", "other", "math"], mixture, 0, 100, 1)
        evidence = []
        for name in ("english", "other", "math"):
            share, largest = limits.shares[name]
            reading = Reading(
                domain=name, state="red", delta=3.0, lower_bound=3.0, tolerance=1.0, hard_limit=5.0
            )
            evidence.append(Evidence.of(reading, 0, share, largest))
        state, _ = decide(state, evidence, settings, limits)
    weights = shares.weights(state)
    assert weights["en_web"] > WEIGHTS["en_web"]
    assert (weights["licensed"] > 0) == is_named
    assert limits.served_by["english"] == ("en_web",) and limits.served_by["other"] == ()
    assert limits.shares["other"] == (None, 1.0)


def test_source_that_only_a_later_phase_draws_is_replayed() -> None:
    mix = mix_with_a_source_that_is_only_measured(phase_weight=0.1)
    assert mix.serving_sources()["english"] == ("en_web", "licensed")


def test_source_that_was_replayed_and_is_then_retired_is_no_longer_trained_on() -> None:
    shares = shares_of_mix(mix_with_a_source_that_is_only_measured())
    weights = shares.weights(GuardState(replay={"licensed": 0.1, "en_web": 0.3}))
    assert weights["licensed"] == 0 and weights["en_web"] == pytest.approx(0.3)
    weights = shares.weights(GuardState(shares={"other": 0.1}))
    assert weights == pytest.approx({**WEIGHTS, "licensed": 0.0})


def test_main_language_takes_what_replay_loses() -> None:
    shares = shares_of(least_replay=0.5)
    expected = {"ja_web": 0.66, "ja_books": 0.11, "en_web": 0.13, "code": 0.1}
    assert shares.weights(GuardState(replay={"en_web": 0.13})) == pytest.approx(expected)


def test_mix_without_a_move_is_the_configured_one() -> None:
    assert shares_of().weights(GuardState()) == pytest.approx(WEIGHTS)


def test_share_that_an_edited_mix_raised_is_not_undercut() -> None:
    weights = shares_of().weights(GuardState(replay={"en_web": 0.13, "gone": 0.1, "ja_web": 0.9}))
    assert weights == pytest.approx(WEIGHTS)


def test_edit_that_gives_more_to_others_takes_it_from_what_the_guard_had_raised() -> None:
    """The guard raised English to 0.7 of a mix whose code was smaller; 0.75 is the limit."""
    weights = shares_of().weights(GuardState(replay={"en_web": 0.7}))
    assert weights == pytest.approx(
        {"en_web": 0.65, "code": 0.1, "ja_web": 0.25 * 6 / 7, "ja_books": 0.25 / 7}
    )
    both = shares_of().weights(GuardState(replay={"en_web": 0.9, "code": 0.8}))
    assert both["en_web"] + both["code"] == pytest.approx(0.75)
    assert both["en_web"] == pytest.approx(0.2 + 0.7 * 0.45 / 1.4)
    assert min(both.values()) > 0 and sum(both.values()) == pytest.approx(1)


def test_single_sources_take_over_where_a_ladder_had_raised() -> None:
    state = GuardState(shares={"english": 0.3}, replay={"en_web": 0.25, "code": 0.15})
    weights = shares_of().weights(state)
    assert weights["en_web"] == pytest.approx(0.3) and weights["code"] == pytest.approx(0.15)


def test_domain_of_the_main_language_cannot_be_replayed() -> None:
    limits = limits_of(shares_of(), GuardState(shares={"english": 0.3}))
    assert limits.shares["japanese"] == (None, 1.0) and limits.served_by["japanese"] == ()
    assert limits.shares["english"][0] == pytest.approx(0.3)
    assert limits.sources.keys() == {"en_web", "code"}
    assert limits.main_share == pytest.approx(0.6)


def test_room_is_what_the_floor_of_the_main_language_leaves() -> None:
    assert limits_of(shares_of()).room == pytest.approx(0.75 - 0.3)
    assert limits_of(shares_of(min_share=0.5)).room == pytest.approx(0.5 - 0.3)


def test_share_is_bounded_by_its_language_and_never_below_the_present_one() -> None:
    assert largest_share(shares_of(english=(0.0, 0.4)), 100) == pytest.approx(0.4)
    assert largest_share(shares_of(english=(0.0, 0.1)), 100) == pytest.approx(0.2)


def test_share_is_bounded_by_the_epochs_that_are_left() -> None:
    shares = shares_of(max_epochs={"en_web": 1.0})
    expected = EPOCH_MARGIN * (NUM_ROWS - 10) / 100
    assert largest_share(shares, rows_left=100, rows_drawn=10) == pytest.approx(expected)
    assert largest_share(shares, rows_left=0) == 1.0


def test_least_share_is_the_mix_or_a_part_of_it() -> None:
    assert limits_of(shares_of()).sources["en_web"].least == pytest.approx(0.2)
    assert limits_of(shares_of(least_replay=0.5)).sources["en_web"].least == pytest.approx(0.1)


def test_floor_of_a_language_bounds_its_least_share() -> None:
    shares = shares_of(least_replay=0.1, english=(0.15, 1.0))
    sources = limits_of(shares).sources
    assert sources["en_web"].least == pytest.approx(0.15)
    assert sources["code"].least == pytest.approx(0.01)


def test_main_language_takes_no_more_than_its_ceiling_and_its_epochs_allow() -> None:
    ceiling = limits_of(shares_of(least_replay=0.1, main_max_share=0.85)).sources
    assert sum(source.least for source in ceiling.values()) == pytest.approx(0.15)
    scarce = shares_of(least_replay=0.1, max_epochs={"ja_web": 1.5})
    sources = limits_of(scarce, rows_left=100).sources
    main = EPOCH_MARGIN * 0.75 * 0.7 / 0.6
    assert sum(source.least for source in sources.values()) == pytest.approx(1 - main)
