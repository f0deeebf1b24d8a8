"""The two-way controller goes up and down, holds every floor, and only permits what is proven."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from cpt.config import GuardSection
from cpt.guard.controller import (
    INTEGRAL,
    LARGEST_FALL,
    LARGEST_RISE,
    MIN_MOVE,
    MOVE_PART,
    SETTLED_LOOKS,
)
from cpt.guard.decision import ROUTERS, after_pause, decide
from cpt.guard.ladder import SEVERITY, Decision, GuardState
from cpt.guard.lever_limits import LeverLimits, SourceLimits
from cpt.guard.yardstick import Evidence

SETTINGS = GuardSection(interval_steps=10)
START = {"en_web": 0.2, "en_books": 0.1, "code": 0.1}
SERVED_BY = {"english": ("en_web", "en_books"), "chat": ("en_books",), "code": ("code",)}
MAX_REPLAY = 0.75


def reading(domain: str, loss: float | None, **changes: Any) -> Evidence:
    """Return a reading with bounds 0.3 below and above the estimate, and the state they give."""
    lower = None if loss is None else loss - 0.3
    upper = None if loss is None else loss + 0.3
    state = "amber"
    if lower is None or lower > 0.5:
        state = "red"
    elif upper is not None and upper < 1:
        state = "green"
    values: dict[str, Any] = {
        "domain": domain,
        "state": state,
        "delta": loss,
        "lower_bound": lower,
        "upper_bound": upper,
        "tolerance": 1.0,
        "hard_limit": 5.0,
    }
    return Evidence(**{**values, **changes})


def limits(state: GuardState, *, least: float = 1.0, **changes: Any) -> LeverLimits:
    """Return the limits of a mix whose other sources are Japanese."""
    sources = {}
    for name, start in START.items():
        share = state.replay.get(name, start)
        sources[name] = SourceLimits(share=share, least=min(share, least * start), largest=0.6)
    total = sum(source.share for source in sources.values())
    values: dict[str, Any] = {
        "room": MAX_REPLAY - total,
        "served_by": SERVED_BY,
        "sources": sources,
        "main_share": 1 - total,
    }
    return LeverLimits(**{**values, **changes})


def look(
    state: GuardState,
    losses: dict[str, float | None],
    settings: GuardSection = SETTINGS,
    least: float = 1.0,
    **changes: Any,
) -> tuple[GuardState, Decision]:
    """Measure some domains once and decide; every domain that is not named is green at 0.6."""
    evidence = []
    for domain in SERVED_BY:
        evidence.append(reading(domain, losses.get(domain, 0.6)))
    return decide(state, evidence, settings, limits(state, least=least, **changes))


def raised(looks: int = 6) -> GuardState:
    """Return the state after English was far over its tolerance for some looks."""
    state = GuardState()
    for _ in range(looks):
        state, _ = look(state, {"english": 3.0})
    return state


def test_replay_rises_with_a_loss_and_falls_when_it_is_gone() -> None:
    state = raised()
    top = dict(state.replay)
    assert top["en_web"] > 0.3 and top["code"] == START["code"]
    taken = []
    for _ in range(60):
        state, decision = look(state, {"english": 0.0, "chat": 0.0})
        taken.append(decision.actions["english"])
    assert "lower_replay" in taken and "raise_replay" not in taken
    assert state.replay["en_web"] < 0.75 * top["en_web"]


def test_share_never_falls_below_the_mix_unless_that_is_allowed() -> None:
    state = raised()
    free = state
    for _ in range(200):
        state, _ = look(state, {"english": 0.0, "chat": 0.0, "code": 0.0})
        free, _ = look(free, {"english": 0.0, "chat": 0.0, "code": 0.0}, least=0.5)
    for name, start in START.items():
        assert start - 1e-12 <= state.replay[name] <= start + max(MIN_MOVE, MOVE_PART * start) * 1.2
        assert free.replay[name] >= 0.5 * start - 1e-12
    assert free.replay["en_web"] < START["en_web"]


def test_point_estimate_raises_replay_before_any_loss_is_proven() -> None:
    evidence = [reading("english", 0.95, lower_bound=-0.5, state="amber")]
    state = GuardState()
    for _ in range(6):
        state, decision = decide(state, evidence, SETTINGS, limits(state))
    assert state.replay["en_web"] > START["en_web"]
    assert decision.action in ("none", "raise_replay")


def test_source_is_lowered_only_when_all_domains_that_it_serves_are_green() -> None:
    state = raised()
    before = dict(state.replay)
    for _ in range(20):
        evidence = [
            reading("english", 0.0),
            reading("chat", 0.0, state="amber"),
            reading("code", 0.0),
        ]
        state, _ = decide(state, evidence, SETTINGS, limits(state))
    assert state.replay["en_books"] == before["en_books"]
    assert state.replay["en_web"] < before["en_web"]


def test_source_follows_the_neediest_domain_that_it_serves() -> None:
    state = GuardState()
    for _ in range(4):
        state, decision = look(state, {"english": 0.0, "chat": 3.0})
    assert state.replay["en_books"] > START["en_books"]
    assert state.replay["en_web"] <= START["en_web"]
    assert "chat" in decision.reason


def test_old_reading_moves_nothing_but_blocks_a_fall_unless_it_is_green() -> None:
    state = raised()
    before = dict(state.replay)
    stale_bad = [reading("english", 3.0, age_steps=10), reading("code", 0.6)]
    after, decision = decide(state, stale_bad, SETTINGS, limits(state))
    assert after.replay == before and decision.actions["english"] == "none"
    for _ in range(20):
        evidence = [reading("english", 0.0), reading("chat", 0.9, age_steps=10, state="amber")]
        state, _ = decide(state, evidence, SETTINGS, limits(state))
    assert state.replay["en_books"] == before["en_books"]
    for _ in range(20):
        evidence = [reading("english", 0.0), reading("chat", 0.5, age_steps=10)]
        state, _ = decide(state, evidence, SETTINGS, limits(state))
    assert state.replay["en_books"] < before["en_books"]


def test_nothing_is_lowered_during_the_warm_up() -> None:
    state = raised()
    before = dict(state.replay)
    for _ in range(20):
        state, _ = look(state, {"english": -1.0, "chat": -1.0}, is_warming_up=True)
    assert state.replay == before
    state, _ = look(GuardState(), {"english": 3.0}, is_warming_up=True)
    assert state.asked["en_web"] > START["en_web"]


def test_small_change_is_remembered_and_applied_when_it_has_grown() -> None:
    state = GuardState()
    for _ in range(10):
        state, _ = look(state, {"english": 0.8, "chat": 0.8})
        if state.replay:
            break
    change = state.replay["en_web"] - START["en_web"]
    assert change > max(MIN_MOVE, MOVE_PART * START["en_web"])


def test_step_of_one_look_is_bounded_in_log_odds() -> None:
    def log_odds(shares: dict[str, float]) -> float:
        return float(np.log(shares["en_web"] / (1 - sum(shares.values()))))

    before = {**START}
    state, _ = look(GuardState(), {"english": 100.0, "chat": 0.6})
    assert log_odds(dict(state.asked)) - log_odds(before) == pytest.approx(LARGEST_RISE)
    # after a great loss, a great gain
    state = dataclasses.replace(raised(), asked={})
    low = dict(state.replay)
    after, _ = look(state, {"english": -9.0, "chat": -9.0})
    assert log_odds(dict(after.asked)) - log_odds(low) == pytest.approx(-LARGEST_FALL)


def test_room_is_divided_and_no_share_passes_its_largest() -> None:
    state = GuardState()
    for _ in range(30):
        state, _ = look(state, {"english": 9.0, "chat": 9.0, "code": 9.0})
        total = sum(state.replay.values())
        assert total <= MAX_REPLAY + 1e-9
    assert total > (1 - MOVE_PART) * MAX_REPLAY
    bounded = limits(GuardState(), room=0.0)
    after, _ = decide(GuardState(), [reading("english", 9.0)], SETTINGS, bounded)
    assert not after.replay


def test_rate_falls_when_no_replay_is_left_and_the_run_pauses_when_nothing_helps() -> None:
    state = GuardState()
    taken = []
    for _ in range(14):
        evidence = [reading("english", 3.0)]
        none_left = LeverLimits(served_by={}, sources={}, main_share=0.6)
        state, decision = decide(state, evidence, SETTINGS, none_left)
        taken.append(decision.action)
        if decision.action == "pause":
            break
    assert taken.count("lower_lr") == 2 and taken[-1] == "pause"
    assert state.lr_scale == SETTINGS.min_lr_scale and "english is at least" in state.paused


def test_loss_that_recovers_is_given_time() -> None:
    state = GuardState()
    none_left = LeverLimits(served_by={}, sources={}, main_share=0.6)
    for loss in np.arange(4.0, 1.5, -0.2):
        state, decision = decide(state, [reading("english", loss)], SETTINGS, none_left)
        assert decision.action in ("warn", "lower_lr")
    assert state.lr_scale >= 0.5


def test_loss_that_stays_over_the_hard_limit_lowers_the_rate_beside_replay() -> None:
    state, first = look(GuardState(), {"english": 7.0})
    state, second = look(state, {"english": 7.0})
    assert first.actions["english"] == "raise_replay" and second.action == "lower_lr"
    assert state.lr_scale == 0.5 and state.replay["en_web"] > START["en_web"]


def test_loss_of_replies_over_the_hard_limit_is_lasting_at_the_second_look_that_measures_them() -> (
    None
):
    state = GuardState()
    actions = []
    for number in range(6):
        evidence = [reading("chat", 7.0, age_steps=number % 5), reading("english", 0.6)]
        state, decision = decide(state, evidence, SETTINGS, limits(state))
        actions.append(decision.actions["chat"])
    assert actions == ["raise_replay", *["none"] * 4, "lower_lr"]


def test_loss_of_another_domain_at_the_look_before_does_not_make_a_first_one_lasting() -> None:
    state, _ = look(GuardState(), {"english": 7.0})
    state, decision = look(state, {"code": 7.0})
    assert decision.actions["code"] == "raise_replay" and state.lr_scale == 1
    assert state.hard == {"code": 1}


@pytest.mark.parametrize("is_smoothed", [True, False])
def test_rate_stays_low_while_an_older_green_reading_is_not_below_the_set_point(
    is_smoothed: bool,
) -> None:
    for loss, scale in ((0.69, 0.25), (0.3, 1.0)):
        state = dataclasses.replace(GuardState(), lr_scale=0.25)
        if is_smoothed:
            state, _ = look(state, {"english": 0.3, "code": 0.3, "chat": loss})
        for _ in range(2 * SETTLED_LOOKS):
            evidence = [reading(domain, 0.3) for domain in ("english", "code")]
            evidence.append(reading("chat", loss, age_steps=10))
            assert evidence[-1].state == "green"
            state, _ = decide(state, evidence, SETTINGS, limits(state))
        assert state.lr_scale == scale


def test_rate_rises_again_after_enough_green_looks() -> None:
    state = dataclasses.replace(GuardState(), lr_scale=0.25)
    scales = []
    for _ in range(2 * SETTLED_LOOKS):
        state, _ = look(state, dict.fromkeys(SERVED_BY, 0.3))
        scales.append(state.lr_scale)
    assert scales == [0.25] * (SETTLED_LOOKS - 1) + [0.5] * SETTLED_LOOKS + [1.0]
    state = dataclasses.replace(GuardState(), lr_scale=0.25)
    for _ in range(3 * SETTLED_LOOKS):
        state, _ = look(state, {"english": 0.65, "chat": 0.3, "code": 0.3})
    assert state.lr_scale == 0.25


def test_score_that_is_not_a_number_asks_for_all_that_a_look_can_give() -> None:
    state, decision = look(GuardState(), {"english": None})
    assert state.replay["en_web"] > START["en_web"] and decision.action == "lower_lr"
    assert "not a number" in decision.reason and "english" not in state.smoothed


def test_run_that_is_over_or_only_warns_pulls_no_lever() -> None:
    evidence = [reading("english", 9.0)]
    state, decision = decide(GuardState(), evidence, SETTINGS, limits(GuardState()), last=True)
    assert decision.action == "warn" and not state.replay and not state.asked
    quiet = GuardSection(policy="warn")
    for _ in range(10):
        state, decision = decide(state, evidence, quiet, limits(state))
        assert decision.action == "warn" and not state.replay and state.lr_scale == 1


def test_run_that_acts_again_does_not_go_on_from_looks_of_long_ago() -> None:
    state = raised(4)
    assert state.smoothed and state.replay
    warned, _ = look(state, {"english": 0.6}, dataclasses.replace(SETTINGS, policy="warn"))
    assert (warned.smoothed, warned.stuck, warned.best, warned.settled) == ({}, {}, {}, 0)
    assert warned.replay == state.replay and warned.asked == state.asked
    again, decision = look(warned, {"english": 0.6})
    assert again.smoothed["english"] == 0.6 and decision.action == "none"


def test_weight_of_the_divergence_rises_before_replay_and_falls_after_it() -> None:
    settings = GuardSection(kl_lever="before", max_kl_weight=0.8)
    state = GuardState()
    for _ in range(260):
        before = state
        state, _ = look(state, {"english": 0.8}, settings, kl_weight=0.1)
        if state.kl_weight != 0.8:
            assert not state.replay and (before.kl_weight or 0) < (state.kl_weight or 0)
    assert state.kl_weight == 0.8 and state.replay["en_web"] > 1.3 * START["en_web"]
    replay_at_top = dict(state.replay)
    weight_when_replay_fell = None
    for _ in range(300):
        state, _ = look(state, dict.fromkeys(SERVED_BY, 0.0), settings, kl_weight=0.1)
        if weight_when_replay_fell is None and state.replay != replay_at_top:
            weight_when_replay_fell = state.kl_weight
    assert weight_when_replay_fell == 0.8
    left = state.replay["en_web"] - START["en_web"]
    assert 0 <= left <= max(MIN_MOVE, MOVE_PART * state.replay["en_web"])
    assert state.kl_weight == pytest.approx(0.1)


def test_proven_loss_raises_replay_although_the_weight_comes_first() -> None:
    settings = GuardSection(kl_lever="before", max_kl_weight=100.0)
    state, decision = look(GuardState(), {"english": 3.0}, settings, kl_weight=0.0)
    assert state.replay["en_web"] > START["en_web"]
    assert state.kl_weight is not None and 0 < state.kl_weight < 100
    assert decision.actions["english"] == "raise_replay"


def test_weight_of_the_divergence_moves_beside_replay_and_not_without_targets() -> None:
    settings = GuardSection(kl_lever="beside")
    state, _ = look(GuardState(), {"english": 3.0}, settings, kl_weight=0.2)
    assert state.kl_weight == pytest.approx(0.2 * np.exp(INTEGRAL * (3 - 0.6))) and state.replay
    state, _ = look(GuardState(), {"english": 3.0}, settings)
    assert state.kl_weight is None and state.replay


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
def test_routers_that_drifted_are_frozen_once(controller: Any) -> None:
    settings = GuardSection(router_lever="freeze", controller=controller)
    state, decision = look(GuardState(), {}, settings, router_overlap=0.9)
    assert not state.routers_frozen and ROUTERS not in decision.actions
    state, decision = look(state, {}, settings, router_overlap=0.75)
    assert state.routers_frozen and decision.actions[ROUTERS] == "freeze_routers"
    assert "75.0 %" in decision.reason
    state, decision = look(state, {}, settings, router_overlap=0.7)
    assert state.routers_frozen and ROUTERS not in decision.actions


def test_routers_that_drifted_raise_replay_until_they_are_back() -> None:
    settings = GuardSection(router_lever="raise_replay")
    state = GuardState()
    for _ in range(4):
        state, _ = look(state, {}, settings, router_overlap=0.75)
    assert sum(state.replay.values()) > sum(START.values()) + 0.03
    before = dict(state.replay)
    state, _ = look(state, {}, settings, router_overlap=0.85)
    assert state.replay == before and not state.routers_frozen


def test_after_a_pause_the_sources_of_what_suffered_get_more_and_counts_begin_anew() -> None:
    state = dataclasses.replace(
        raised(2), paused="english", over={"english": 5}, stuck={"english": 4}
    )
    suffering = [reading("english", None)]
    after = after_pause(state, suffering, SETTINGS, limits(state))
    assert after.replay["en_web"] > state.replay["en_web"]
    assert after.replay["code"] == pytest.approx(state.replay["code"])
    assert not after.paused and after.rollbacks == 1 and not after.stuck and not after.over


@pytest.mark.parametrize("seed", range(10))
def test_decision_follows_from_what_json_holds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    settings = GuardSection(kl_lever="beside", router_lever="freeze")
    state = GuardState()
    for _ in range(40):
        evidence = []
        for domain in SERVED_BY:
            loss = None if generator.random() < 0.03 else float(generator.normal(1, 1.5))
            age_steps = 10 * int(generator.random() < 0.2)
            evidence.append(reading(domain, loss, age_steps=age_steps))
        bounds = limits(state, kl_weight=0.1, router_overlap=float(generator.uniform(0.7, 1)))
        after, decision = decide(state, evidence, settings, bounds)
        stored = json.loads(
            json.dumps([state.to_json(), [one.to_json() for one in evidence], bounds.to_json()])
        )
        again = decide(
            GuardState.from_json(stored[0]),
            [Evidence.from_json(one) for one in stored[1]],
            settings,
            LeverLimits.from_json(stored[2]),
        )
        assert again[1] == decision
        assert again[0].to_json() == after.to_json()
        assert SEVERITY.index(decision.action) <= SEVERITY.index("pause")
        assert sum(after.replay.values()) <= MAX_REPLAY + 1e-9
        state = dataclasses.replace(after, paused="")
