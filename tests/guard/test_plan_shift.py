"""What the guard gives to replay goes along with the plan of the mix, in points of share."""

from __future__ import annotations

from typing import Any

import pytest

from cpt.config import GuardSection
from cpt.guard.decision import decide
from cpt.guard.ladder import GuardState
from cpt.guard.plan_shift import on_plan
from cpt.guard.yardstick import Evidence, Reading
from tests.guard.test_replay_share import WEIGHTS, limits_of, shares_of

ANNEAL = {"ja_web": 0.3, "ja_books": 0.3, "en_web": 0.3, "code": 0.1}
WITHOUT_ENGLISH = {"ja_web": 0.6, "ja_books": 0.3, "en_web": 0.0, "code": 0.1}
RAISED = GuardState(replay={"en_web": 0.34, "code": 0.1}, planned={"en_web": 0.2, "code": 0.1})
"""English was raised by 14 points where the plan gave it 20 %."""


def test_a_raise_holds_on_as_many_points_on_top_of_every_plan() -> None:
    for plan, expected in ((WEIGHTS, 0.34), (ANNEAL, 0.44), (WITHOUT_ENGLISH, 0.14)):
        weights = shares_of().at(plan, {}).weights(RAISED)
        assert weights["en_web"] == pytest.approx(expected)
        assert weights["code"] == pytest.approx(0.1)
        assert sum(weights.values()) == pytest.approx(1)
        assert weights["ja_web"] / weights["ja_books"] == pytest.approx(
            plan["ja_web"] / plan["ja_books"]
        )


def test_a_share_of_a_domain_moves_with_the_sources_that_serve_it() -> None:
    state = GuardState(shares={"english": 0.34}, planned={"en_web": 0.2, "code": 0.1})
    assert shares_of().at(ANNEAL, {}).weights(state)["en_web"] == pytest.approx(0.44)


def test_what_was_lowered_stays_above_the_least_part_of_every_plan() -> None:
    state = GuardState(replay={"en_web": 0.12}, planned={"en_web": 0.2, "code": 0.1})
    shares = shares_of(least_replay=0.5)
    assert shares.at(ANNEAL, {}).weights(state)["en_web"] == pytest.approx(0.22)
    little = {**WITHOUT_ENGLISH, "ja_web": 0.5, "en_web": 0.1}
    assert shares.at(little, {}).weights(state)["en_web"] == pytest.approx(0.05)


def test_bounds_of_the_phase_hold_and_not_those_of_the_mix() -> None:
    free = shares_of(min_share=0.6)
    assert free.at(ANNEAL, {}).weights(RAISED)["en_web"] == pytest.approx(0.44)
    floor = {"ja": {"min_share": 0.55, "max_share": 1.0}}
    assert free.at(ANNEAL, floor).weights(RAISED)["en_web"] == pytest.approx(0.35)


def test_a_phase_without_the_main_language_stays_as_planned() -> None:
    plan = {"ja_web": 0.0, "ja_books": 0.0, "en_web": 0.7, "code": 0.3}
    assert shares_of().at(plan, {}).weights(RAISED) == plan


def test_state_without_a_schedule_is_what_it_always_was() -> None:
    state = GuardState(replay={"en_web": 0.34})
    assert on_plan(state, {}, {}) is state
    assert limits_of(shares_of()).planned == {}


def test_moving_along_the_plan_and_back_gives_the_same_state() -> None:
    state = GuardState(
        replay={"en_web": 0.34},
        asked={"en_web": 0.36, "code": 0.09},
        shares={"english": 0.3},
        planned={"en_web": 0.2, "code": 0.1},
    )
    served_by = {"english": ("en_web",)}
    there = on_plan(state, {"en_web": 0.0, "code": 0.3}, served_by)
    assert there.asked == pytest.approx({"en_web": 0.16, "code": 0.29})
    back = on_plan(there, state.planned, served_by)
    assert back.asked == pytest.approx(state.asked)
    assert back.replay == pytest.approx(state.replay)
    assert back.shares == pytest.approx(state.shares)


def green(domain: str) -> Evidence:
    reading = Reading(
        domain=domain,
        step=10,
        state="green",
        delta=0.5,
        lower_bound=0.0,
        tolerance=1.0,
        hard_limit=5.0,
    )
    return Evidence.of(reading, 10, None, 1.0)


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
def test_a_phase_that_raises_english_by_itself_is_no_reason_to_lower_it(controller: Any) -> None:
    """Before, the share asked for in the last phase pulled the new one down to it."""
    settings = GuardSection(controller=controller)
    state = GuardState(asked={"en_web": 0.2, "code": 0.1}, planned={"en_web": 0.2, "code": 0.1})
    limits = limits_of(shares_of(least_replay=0.5).at(ANNEAL, {}), state)
    after, decision = decide(state, [green("english")], settings, limits)
    assert decision.action == "none" and not after.replay and not after.shares
    assert after.planned == {"code": 0.1, "en_web": 0.3}
    assert after.asked.get("en_web", 0.3) == pytest.approx(0.3)


def test_epochs_that_the_plan_takes_later_are_not_left_for_now() -> None:
    """30 of 50 rows of English are left to 100 rows of the run, and the plan takes 25 of them."""
    shares = shares_of(max_epochs={"en_web": 1.0}).at(WEIGHTS, {})
    place: dict[str, Any] = {"batches_left": 100, "batch_size": 1}

    class Drawn:
        """A mixture that has given 20 rows of every source."""

        drawn_rows = (20, 20, 20, 20)

        def position(self, batch: int, batch_size: int) -> Drawn:
            return self

    mixture: Any = Drawn()
    mean_shares = {**WEIGHTS, "en_web": 0.25}
    limits = shares.limits(GuardState(), ["english"], mixture, 0, mean_shares=mean_shares, **place)
    left = 0.98 * 30 / 100 - 0.25
    assert limits.sources["en_web"].largest == pytest.approx(WEIGHTS["en_web"] + left)
