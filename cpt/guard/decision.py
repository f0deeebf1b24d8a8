"""The decision after a look, by the law that the run asks for; a pure function.

    guard.controller: two_way -> cpt/guard/controller.py
    guard.controller: ladder  -> cpt/guard/ladder.py

Under a schedule the shares in the state are moved to the present plan first (`on_plan`). Freezing
the routers (`guard.router_lever`) works with both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cpt.config import GuardSection
from cpt.guard import ladder
from cpt.guard.controller import decide_two_way, replay_after_pause, routers_drifted
from cpt.guard.ladder import SEVERITY, Decision, GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.plan_shift import on_plan
from cpt.guard.yardstick import Evidence

ROUTERS = "(routers)"
"""Name under which an action on the routers stands among those of the domains."""


def decide(
    state: GuardState,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    limits: LeverLimits,
    *,
    last: bool = False,
) -> tuple[GuardState, Decision]:
    """Return the next state and the decision.

    Args:
        state: State before the look.
        evidence: Newest reading of every domain.
        settings: The run's guard section.
        limits: How far the levers can still move.
        last: Whether the run is over, so that nothing but a warning makes sense.
    """
    state = on_plan(state, limits.planned, limits.served_by)
    if settings.controller == "ladder":
        state, decision = ladder.decide(
            state, evidence, settings, replay_room=limits.room, last=last
        )
    else:
        state, decision = decide_two_way(state, evidence, settings, limits, last=last)
    may_freeze = settings.policy == "act" and not last and not state.routers_frozen
    if may_freeze and routers_drifted(settings, limits, "freeze"):
        state, decision = _freeze_routers(state, decision, settings, limits)
    return state, decision


def _freeze_routers(
    state: GuardState, decision: Decision, settings: GuardSection, limits: LeverLimits
) -> tuple[GuardState, Decision]:
    action = "freeze_routers"
    reason = (
        f"the routers choose as before in {100 * (limits.router_overlap or 0):.1f} % of cases "
        f"(guard.least_router_overlap {100 * settings.least_router_overlap:g} %): {action}"
    )
    decision = Decision(
        action=max(decision.action, action, key=SEVERITY.index),
        actions={**decision.actions, ROUTERS: action},
        reason="; ".join(filter(None, (decision.reason, reason))),
    )
    return dataclasses.replace(state, routers_frozen=True), decision


def after_pause(
    state: GuardState,
    suffering: Sequence[Evidence],
    settings: GuardSection,
    limits: LeverLimits,
) -> GuardState:
    """Return the state with which a paused run goes on: with more replay, and counts anew.

    Args:
        state: The saved state.
        suffering: The domains that were over their line, with a bound of None.
        settings: The run's guard section.
        limits: How far the levers can still move.
    """
    state = on_plan(state, limits.planned, limits.served_by)
    after = ladder.after_pause(state, suffering, settings, replay_room=limits.room)
    if settings.controller == "ladder":
        return after
    replay = replay_after_pause(state, suffering, limits)
    return dataclasses.replace(
        after, shares={}, replay=replay, asked={}, headings={}, smoothed={}, stuck={}, best={}
    )
