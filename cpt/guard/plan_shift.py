"""Shares that the guard gave, moved along a mix that follows a schedule.

Decisions
    What the guard has done to a source is kept in points: its share less the planned one. Where the
    plan gives the source another share, in a later phase or further along a linear change, the
    guard's share is the planned one plus the same points. So a raise holds on through all later
    phases, also for a source that a phase leaves out; a straight line stays a straight line; and
    what a phase raises by itself is not taken for the guard's doing.
    The state names the planned shares that its own are to be compared with (`GuardState.planned`).
    It is moved at the beginning of each decision, inside the pure function, so `cpt guard audit`
    repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cpt.guard.ladder import GuardState


def on_plan(
    state: GuardState, planned: Mapping[str, float], served_by: Mapping[str, Sequence[str]]
) -> GuardState:
    """Return the state with its shares as they are where the plan gives other ones.

    Args:
        state: The guard's state.
        planned: Share of each replayed source in the plan; empty without a schedule.
        served_by: Sources that are replayed for each domain, by domain.
    """
    if not planned or planned == state.planned:
        return state
    points = {}
    for name, share in planned.items():
        points[name] = share - state.planned.get(name, share)
    shares = {}
    for domain, share in state.shares.items():
        moved = [points.get(name, 0.0) for name in served_by.get(domain, ())]
        shares[domain] = share + sum(moved)
    return replace(
        state,
        planned=dict(planned),
        shares=shares,
        replay=_moved(state.replay, points),
        asked=_moved(state.asked, points),
    )


def _moved(shares: Mapping[str, float], points: Mapping[str, float]) -> dict[str, float]:
    return {name: share + points.get(name, 0.0) for name, share in shares.items()}
