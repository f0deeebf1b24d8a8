"""What follows from a measurement: a pure function of the guard's state and the evidence, so that
it can be replayed.

    measurement -> evidence per domain -> decide -> (new state, decision) -> the levers
    (cpt/job/guard_levers.py)

The ladder, lowest rung first.  A domain is over its line when the decision bound of its change
(cpt/guard/paired_test.py) is above `act_at` times its tolerance: acting begins before the tolerance
is used up.

    warn          over the line for the first time, or waiting for a lever to show
    raise_replay  over the line twice in a row, or over the tolerance: the share of its sources
    grows, within a bound
    lower_lr      over the hard limit; or over the tolerance with no replay left to raise, `patience` measurements after
                  a lever was last pulled
    pause         over the tolerance with no lever left, and `pause_after` measurements have passed since the last one
                  was pulled; or `patience`, if the hard limit was exceeded `pause_after` times in a
                  row: save, exit 75
    rollback      at the start after a pause: the last checkpoint saved while all was green, with more replay

A raise is given one measurement to show before the next, unless the domain is over its tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cpt.config import GuardSection

SEVERITY = ("none", "warn", "raise_replay", "lower_lr", "pause", "rollback")
"""Actions, each stronger than the one before."""


class _Plain:
    """Frozen dataclasses of plain values, to JSON and back."""

    __slots__ = ()

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | None) -> Self:
        """Read what `to_json` gave; None is the default."""
        return cls(**(plain or {}))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return {
            name: dict(value) if isinstance(value, Mapping) else value for name, value in values
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence(_Plain):
    """What is known of one domain when a decision is made."""

    domain: str
    """Its name."""
    lower_bound: float | None
    """Decision bound of its change in percent; None if a score is not a number."""
    tolerance_percent: float
    """Tolerated rise of bits per byte."""
    hard_limit_percent: float
    """Rise that ends in a pause if it stays."""
    share: float | None = None
    """Share of the predicted tokens that its sources have now, 0 to 1; None if replay cannot help
    it.
    """
    largest_share: float = 1.0
    """What that share may grow to: limits of its language, epochs of its sources."""

    def above(self, percent: float) -> bool:
        """Whether the change is surely above a line; what is not a number is above all of them."""
        return self.lower_bound is None or self.lower_bound > percent


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardState(_Plain):
    """What the guard remembers between measurements; saved with every checkpoint."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Share to which the sources of a domain were raised, by domain."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    over: Mapping[str, int] = field(default_factory=dict)
    """Measurements in a row that found a domain over its line."""
    hard: int = 0
    """Measurements in a row that found some domain over its hard limit."""
    idle: int = 1
    """Measurements since a lever was pulled."""
    green: bool = True
    """Whether no domain was over its line at the last measurement."""
    green_step: int | None = None
    """Step of the newest checkpoint that was saved while green."""
    paused: str = ""
    """Why the run was paused; empty: it was not, or has gone on since."""
    rollbacks: int = 0
    """How often the run has gone on after a pause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is done after one measurement."""

    action: str
    """The strongest action taken."""
    actions: Mapping[str, str]
    """Action by domain; every measured domain is there."""
    reason: str
    """For people; empty if nothing is done."""


def decide(
    state: GuardState,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    *,
    replay_room: float,
    last: bool = False,
) -> tuple[GuardState, Decision]:
    """The next state and what to do.

    Args:
        state: Before the measurement.
        evidence: One entry per measured domain.
        settings: The ladder.
        replay_room: Share of the tokens by which all replay together may still grow.
        last: The run is over: nothing but warnings makes sense.
    """
    over = {
        e.domain: state.over.get(e.domain, 0) + 1
        for e in evidence
        if e.above(settings.act_at * e.tolerance_percent)
    }
    beyond = [e.domain for e in evidence if e.above(e.tolerance_percent)]
    hard = state.hard + 1 if any(e.above(e.hard_limit_percent) for e in evidence) else 0
    state = dataclasses.replace(state, over=over, hard=hard, idle=state.idle + 1, green=not over)
    actions = {e.domain: "warn" if e.domain in over else "none" for e in evidence}
    if over and not last and settings.policy == "act":
        state, pulled = _pull(state, evidence, beyond, settings, replay_room)
        actions |= pulled
    decision = Decision(
        action=max(actions.values(), key=SEVERITY.index, default="none"),
        actions=actions,
        reason="; ".join(
            _told(e, actions[e.domain]) for e in evidence if actions[e.domain] != "none"
        ),
    )
    if decision.action == "pause":
        state = dataclasses.replace(state, paused=decision.reason)
    return state, decision


def _pull(
    state: GuardState,
    evidence: Sequence[Evidence],
    beyond: list[str],
    settings: GuardSection,
    replay_room: float,
) -> tuple[GuardState, dict[str, str]]:
    """Choose the lever: one rung per measurement, two where a hard limit is exceeded."""
    pulled: dict[str, str] = {}
    idle = state.idle
    if (idle > 1 or beyond) and (raised := raised_shares(state, evidence, settings, replay_room)):
        state = dataclasses.replace(state, shares={**state.shares, **raised}, idle=0)
        pulled = dict.fromkeys(raised, "raise_replay")
    urgent = [e.domain for e in evidence if e.above(e.hard_limit_percent)]
    in_vain = beyond if not pulled and idle >= settings.patience else []
    if (urgent or in_vain) and state.lr_scale > settings.min_lr_scale:
        scale = max(settings.min_lr_scale, state.lr_scale * settings.lr_factor)
        state = dataclasses.replace(state, lr_scale=scale, idle=0)
        pulled |= dict.fromkeys(urgent or in_vain, "lower_lr")
    if pulled:
        return state, pulled
    waited = settings.patience if state.hard >= settings.pause_after else settings.pause_after
    return state, dict.fromkeys(beyond if state.idle >= waited else [], "pause")


def after_pause(
    state: GuardState, evidence: Sequence[Evidence], settings: GuardSection, *, replay_room: float
) -> GuardState:
    """The state with which a paused run goes on: more replay for what suffered, and every count
    from the beginning.

    Args:
        state: As it was saved; `over` says what suffered.
        evidence: The domains with their shares; bounds are those of the pause.
        settings: The ladder.
        replay_room: As in `decide`.
    """
    raised = raised_shares(state, evidence, settings, replay_room)
    return dataclasses.replace(
        state,
        shares={**state.shares, **raised},
        over={},
        hard=0,
        idle=0,
        green=True,
        paused="",
        rollbacks=state.rollbacks + 1,
    )


def raised_shares(
    state: GuardState, evidence: Sequence[Evidence], settings: GuardSection, replay_room: float
) -> dict[str, float]:
    """New shares of the domains whose turn it is; with too little room, each gets the same part of
    its growth.
    """
    growth: dict[str, float] = {}
    now: dict[str, float] = {}
    for e in evidence:
        if e.share is None or not (state.over.get(e.domain, 0) > 1 or e.above(e.tolerance_percent)):
            continue
        wanted = min(
            e.largest_share, max(e.share * settings.replay_factor, e.share + settings.replay_step)
        )
        if wanted > e.share:
            now[e.domain], growth[e.domain] = e.share, wanted - e.share
    total = sum(growth.values())
    if replay_room < 1e-6 or not total:
        return {}
    part = min(1.0, replay_room / total)
    return {domain: now[domain] + part * more for domain, more in growth.items()}


def _told(evidence: Evidence, action: str) -> str:
    bound = (
        "not a number"
        if evidence.lower_bound is None
        else f"at least {evidence.lower_bound:.2f} % worse"
    )
    return f"{evidence.domain} is {bound} (tolerance {evidence.tolerance_percent:g} %): {action}"
