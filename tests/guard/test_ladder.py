"""The guard climbs one rung at a time, only on certainty, and its decisions can be made again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from cpt.config import DomainLimits, GuardSection
from cpt.guard.ladder import SEVERITY, Decision, GuardState, after_pause, decide
from cpt.guard.yardstick import Evidence, state_of

SETTINGS = GuardSection(interval_steps=10, tolerance_percent=1.0, hard_limit_percent=5.0)


def english(bound: float | None, share: float | None = 0.1, **more: Any) -> Evidence:
    return Evidence(
        domain="english",
        state=state_of(bound, 0.0, line=0.5, tolerance=1.0),
        lower_bound=bound,
        tolerance=1.0,
        hard_limit=5.0,
        share=share,
        **more,
    )


def climb(
    bounds: list[float | None], share: float | None = 0.1, room: float = 0.5
) -> tuple[GuardState, list[Decision]]:
    """Measure one domain several times; a raise becomes the share of the next measurement."""
    state = GuardState()
    decisions = []
    for bound in bounds:
        now = None if share is None else state.shares.get("english", share)
        used = 0.0 if now is None or share is None else now - share
        state, decision = decide(state, [english(bound, now)], SETTINGS, replay_room=room - used)
        decisions.append(decision)
    return state, decisions


def actions(decisions: list[Decision]) -> list[str]:
    return [decision.action for decision in decisions]


def test_what_is_below_the_line_leads_to_nothing() -> None:
    state, decisions = climb([-3.0, 0.0, 0.49])
    assert actions(decisions) == ["none"] * 3 and state.green and not state.shares


def test_checkpoint_is_green_only_if_every_domain_is() -> None:
    kept = dataclasses.replace(english(0.0), domain="code")
    for state in ("green", "amber", "red"):
        evidence = [kept, dataclasses.replace(english(0.0), state=state)]
        after, _ = decide(GuardState(), evidence, SETTINGS, replay_room=0.5)
        assert after.green == (state == "green")


def test_line_is_that_of_the_reading_which_for_traces_is_the_tolerance() -> None:
    certain = dataclasses.replace(english(0.7), kind="traces", state="amber")
    after, decision = decide(GuardState(), [certain], SETTINGS, replay_room=0.5)
    assert decision.action == "none" and not after.over
    lost = dataclasses.replace(english(0.7), kind="traces", state="red")
    after, decision = decide(GuardState(), [lost], SETTINGS, replay_room=0.5)
    assert decision.action == "warn" and after.over == {"english": 1}


def test_domain_that_was_not_measured_keeps_its_count_and_pulls_no_lever() -> None:
    state, decisions = climb([0.6])
    old = english(6.0, age_steps=10)
    after, decision = decide(state, [old], SETTINGS, replay_room=0.5)
    assert actions(decisions) == ["warn"] and decision.action == "none"
    assert (after.over, after.hard, after.green) == ({"english": 1}, {}, False)
    _, decision = decide(after, [english(0.6)], SETTINGS, replay_room=0.5)
    assert decision.action == "raise_replay"


def test_first_sight_is_a_warning_and_the_second_raises_replay() -> None:
    state, decisions = climb([0.6, 0.7])
    assert actions(decisions) == ["warn", "raise_replay"]
    assert state.shares == {"english": pytest.approx(0.15)} and not state.green


def test_what_is_over_the_tolerance_is_answered_at_once() -> None:
    assert actions(climb([1.2])[1]) == ["raise_replay"]


def test_raise_is_given_one_measurement_to_show() -> None:
    assert actions(climb([0.6, 0.6, 0.6, 0.6, 0.4])[1]) == [
        "warn",
        "raise_replay",
        "warn",
        "raise_replay",
        "none",
    ]
    assert actions(climb([1.2, 1.2, 0.6, 0.4])[1]) == [
        "raise_replay",
        "raise_replay",
        "warn",
        "none",
    ]


def test_small_share_grows_by_a_step_and_a_large_one_by_a_factor() -> None:
    assert climb([1.2], share=0.0)[0].shares["english"] == pytest.approx(0.03)
    assert climb([1.2], share=0.2)[0].shares["english"] == pytest.approx(0.3)


def test_domains_share_the_room_that_is_left() -> None:
    english_evidence = english(2.0, 0.2)
    code_evidence = dataclasses.replace(english_evidence, domain="code", share=0.04)
    state, _ = decide(GuardState(), [english_evidence, code_evidence], SETTINGS, replay_room=0.06)
    growth_of_english = state.shares["english"] - 0.2
    growth_of_code = state.shares["code"] - 0.04
    assert growth_of_english + growth_of_code == pytest.approx(0.06)
    assert growth_of_english / growth_of_code == pytest.approx(0.1 / 0.03)


def test_share_does_not_grow_beyond_what_its_source_can_give() -> None:
    state, decision = decide(
        GuardState(), [english(2.0, 0.1, largest_share=0.12)], SETTINGS, replay_room=0.5
    )
    assert decision.action == "raise_replay" and state.shares == {"english": pytest.approx(0.12)}
    state, decision = decide(
        GuardState(), [english(2.0, 0.1, largest_share=0.1)], SETTINGS, replay_room=0.5
    )
    assert decision.action == "lower_lr" and not state.shares


def test_without_replay_the_rate_falls_then_the_run_pauses() -> None:
    state, decisions = climb([1.5] * 9, share=None)
    assert actions(decisions) == [
        "lower_lr",
        "warn",
        "lower_lr",
        "warn",
        "warn",
        "warn",
        "pause",
        "pause",
        "pause",
    ]
    assert state.lr_scale == 0.25 and "english is at least 1.50 % worse" in state.paused


def test_rate_falls_only_when_replay_is_used_up() -> None:
    _, decisions = climb([1.5] * 8, share=0.1, room=0.05)
    assert actions(decisions)[:4] == ["raise_replay", "warn", "lower_lr", "warn"]
    assert actions(climb([1.5, 1.5, 0.9], share=0.1, room=0.05)[1]) == [
        "raise_replay",
        "warn",
        "warn",
    ]


def test_loss_over_the_hard_limit_pulls_two_levers_at_once_and_pauses_sooner() -> None:
    state, decisions = climb([6.0])
    assert actions(decisions) == ["lower_lr"]
    assert state.shares and state.lr_scale == 0.5
    assert actions(climb([6.0] * 6, share=None)[1]) == [
        "lower_lr",
        "lower_lr",
        "warn",
        "pause",
        "pause",
        "pause",
    ]
    assert "pause" not in actions(climb([6.0, 6.0, 6.0, 2.0, 6.0], share=None)[1])


def test_looks_over_the_hard_limit_are_counted_for_each_domain_over_those_that_measured_it() -> (
    None
):
    state = GuardState()
    counts = []
    for look in range(12):
        replies = dataclasses.replace(english(6.0, age_steps=look % 4), domain="replies")
        text = english(6.0 if look % 2 else 0.0, None)
        state, _ = decide(state, [replies, text], SETTINGS, replay_room=0.0)
        counts.append(state.hard)
    assert [count.get("replies") for count in counts] == [1] * 4 + [2] * 4 + [3] * 4
    assert [count.get("english") for count in counts] == [None, 1] * 6


def test_only_a_domain_that_was_itself_over_the_hard_limit_pauses_sooner() -> None:
    state = GuardState(lr_scale=SETTINGS.min_lr_scale, hard={"code": 3}, idle=SETTINGS.patience - 1)
    code = dataclasses.replace(english(6.0, None), domain="code")
    evidence = [code, english(1.5, None)]
    _, decision = decide(state, evidence, SETTINGS, replay_room=0.0)
    assert decision.actions == {"code": "pause", "english": "warn"}


def test_count_of_all_domains_together_is_read_as_those_of_the_domains_over_their_limit() -> None:
    readings = {"english": english(6.0).reading(), "code": english(0.7).reading()}
    old = {
        **GuardState().to_json(),
        "hard": 3,
        "over": {"english": 2, "code": 4},
        "readings": {name: reading.to_json() for name, reading in readings.items()},
    }
    assert GuardState.from_json(old).hard == {"english": 2}
    del old["readings"]  # before 0.2
    assert GuardState.from_json(old).hard == {"english": 2, "code": 3}
    assert GuardState.from_json({**old, "hard": 0}).hard == {}


def test_score_that_is_not_a_number_is_over_every_line() -> None:
    state, decisions = climb([None])
    assert actions(decisions) == ["lower_lr"] and state.shares and state.hard == {"english": 1}
    assert "not a number" in decisions[0].reason


def test_run_that_is_over_or_only_warns_pulls_no_lever() -> None:
    state, decision = decide(GuardState(), [english(9.0)], SETTINGS, replay_room=0.5, last=True)
    assert decision.action == "warn" and state.shares == {}
    quiet = GuardSection(policy="warn")
    for _ in range(10):
        state, decision = decide(state, [english(9.0)], quiet, replay_room=0.5)
        assert decision.action == "warn" and state.lr_scale == 1


def test_after_a_pause_what_suffered_gets_more_replay_and_counts_begin_anew() -> None:
    paused, _ = climb([6.0] * 8, room=0.1)
    assert paused.paused
    state = after_pause(
        paused, [english(None, paused.shares["english"])], SETTINGS, replay_room=0.5
    )
    assert state.shares["english"] > paused.shares["english"] and not state.paused
    assert (state.over, state.hard, state.idle, state.rollbacks) == ({}, {}, 0, 1)


def test_domain_has_limits_of_its_own() -> None:
    settings = GuardSection(
        domains={"code": DomainLimits(tolerance_percent=3.0)}, hard_limit_percent=4.0
    )
    assert settings.limits("code") == (3.0, 4.0) and settings.limits("english") == (1.0, 4.0)
    too_high = GuardSection(domains={"code": DomainLimits(tolerance_percent=9.0)})
    assert [key for key, _ in too_high.check()] == ["domains.code.tolerance_percent"]


@pytest.mark.parametrize("seed", range(20))
def test_decision_follows_from_what_json_holds_and_bounds_are_kept(seed: int) -> None:
    generator = np.random.default_rng(seed)
    state = GuardState()
    share = 0.05
    for _ in range(60):
        bound = None if generator.random() < 0.05 else float(generator.normal(1, 2))
        evidence = [english(bound, state.shares.get("english", share), largest_share=0.6)]
        room = 0.4 - evidence[0].share if evidence[0].share is not None else 0.0
        after, decision = decide(state, evidence, SETTINGS, replay_room=room)
        stored_state, stored_evidence = json.loads(
            json.dumps([state.to_json(), evidence[0].to_json()])
        )
        again = decide(
            GuardState.from_json(stored_state),
            [Evidence.from_json(stored_evidence)],
            SETTINGS,
            replay_room=room,
        )
        assert again == (after, decision)
        assert after.shares.get("english", share) <= 0.4 + 1e-9
        assert after.lr_scale >= SETTINGS.min_lr_scale
        assert SEVERITY.index(decision.action) <= SEVERITY.index("pause")
        state = after
        if decision.action == "pause":
            state = after_pause(after, evidence, SETTINGS, replay_room=room)
