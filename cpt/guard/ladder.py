"""The ladder: what follows from a measurement, as a pure function of state and evidence.

    measurement -> evidence per domain -> decide -> (new state, decision) -> the levers
    (cpt/job/guard_levers.py)

Because it is pure, `cpt guard audit` can make every decision again. The rungs, lowest first:

    warn          The domain is over its line for the first time, or a lever has yet to show.
    raise_replay  It is over the line twice in a row, or over the tolerance. The share of its
                  sources grows, within a bound.
    lower_lr      It is over the hard limit. Or it is over the tolerance, no replay is left to
                  raise, and `patience` measurements have passed since a lever was pulled.
    pause         It is over the tolerance with no lever left, and `pause_after` measurements have
                  passed since the last lever was pulled, or `patience` if its hard limit was
                  exceeded `pause_after` times in a row. The run saves and exits with 75.
    rollback      The start after a pause: the run goes on from the last checkpoint saved while all
                  was green, with more replay.

A domain is over its line when its reading is red: the loss that is certain
(`Reading.lower_bound`) is above `act_at` times its tolerance, so that acting begins before the
tolerance is used up. Own traces are over it from the tolerance on. A raise is given one
measurement to show before the next, unless the domain is over its tolerance.

Domains may be due at different looks, so what is counted is counted for each of them, over the
looks that measured it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cpt.config import GuardSection
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.yardstick import UNITS, Evidence, Json, Plain, Reading

SEVERITY = (
    "none",
    "lower_replay",
    "lower_kl",
    "raise_lr",
    "warn",
    "raise_kl",
    "raise_replay",
    "freeze_routers",
    "lower_lr",
    "pause",
    "rollback",
)
"""Actions, each stronger than the one before."""
LEVERS = ("raise_kl", "raise_replay", "freeze_routers", "lower_lr")
"""Actions against a loss that change how the run goes on."""
RELIEFS = ("lower_replay", "lower_kl", "raise_lr")
"""Actions that take back such a change; only the two-way controller has them."""
MIN_REPLAY_ROOM = 1e-6
"""Share of the tokens; less room than this is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardState(Plain):
    """The memory of the guard between measurements; it is saved with every checkpoint."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Share to which the sources of a domain were raised, by domain."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    over: Mapping[str, int] = field(default_factory=dict)
    """Measurements in a row that found a domain over its line, by domain."""
    hard: Mapping[str, int] = field(default_factory=dict)
    """Measurements in a row that found a domain over its hard limit, by domain."""
    idle: int = 1
    """Measurements since a lever was pulled."""
    green: bool = True
    """Whether every domain was green at its last measurement: its loss is surely tolerable."""
    green_step: int | None = None
    """Step of the newest checkpoint that was saved while green."""
    paused: str = ""
    """Reason of a pause after which the run has not gone on; empty if there is none."""
    rollbacks: int = 0
    """How often the run has gone on after a pause."""
    yardsticks: Mapping[str, Json] = field(default_factory=dict)
    """Sequential state of each yardstick, by its kind."""
    readings: Mapping[str, Json] = field(default_factory=dict)
    """Newest reading of each domain, by domain."""
    smoothed: Mapping[str, float] = field(default_factory=dict)
    """Loss of each domain in tolerances, smoothed over looks (cpt/guard/controller.py)."""
    asked: Mapping[str, float] = field(default_factory=dict)
    """Share that the two-way controller asks for each source, applied or not."""
    replay: Mapping[str, float] = field(default_factory=dict)
    """Share that the two-way controller gave to each source."""
    headings: Mapping[str, int] = field(default_factory=dict)
    """Direction in which the share of a source last moved: 1 or -1."""
    stuck: Mapping[str, int] = field(default_factory=dict)
    """Looks in a row that a domain was over its tolerance without a lever or a recovery."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Smoothed loss of such a domain when its count began."""
    settled: int = 0
    """Looks in a row that found every domain green and below the set point."""
    kl_weight: float | None = None
    """Weight of the divergence, if the guard has moved it."""
    routers_frozen: bool = False
    """Whether the routers are no longer trained."""
    planned: Mapping[str, float] = field(default_factory=dict)
    """Share that the schedule of the mix planned for each replayed source where `shares`, `replay`
    and `asked` were last looked at (cpt/guard/plan_shift.py); empty without a schedule."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | None) -> Self:
        """Read the output of `to_json`, also as older versions wrote it."""
        values = dict(plain or {})
        if isinstance(values.get("hard"), int):
            values["hard"] = _hard_by_domain(values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The actions after one measurement."""

    action: str
    """The strongest action taken."""
    actions: Mapping[str, str]
    """Action by domain; every domain is there."""
    reason: str
    """Reason for people; empty if nothing is done."""


def evidence_at(
    step: int, domains: Iterable[str], readings: Mapping[str, Json], replay: LeverLimits
) -> list[Evidence]:
    """Return the newest readings of domains as a decision at a step takes them.

    Args:
        step: Optimizer steps done.
        domains: Names of the domains; one that was never measured is left out.
        readings: `GuardState.readings`.
        replay: Present shares of replay and their limits.
    """
    evidence = []
    for domain in domains:
        if domain in readings:
            share, largest_share = replay.shares.get(domain, (None, 1.0))
            reading = Reading.from_json(readings[domain])
            evidence.append(Evidence.of(reading, step, share, largest_share))
    return evidence


def decide(
    state: GuardState,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    *,
    replay_room: float,
    last: bool = False,
) -> tuple[GuardState, Decision]:
    """Return the next state and the decision.

    Args:
        state: State before the measurement.
        evidence: One entry per domain. One that this look did not measure keeps its count, and no
            lever is pulled for it.
        settings: The run's guard section.
        replay_room: Share of the tokens by which all replay together may still grow.
        last: Whether the run is over, so that nothing but a warning makes sense.
    """
    state, actions = observed(state, evidence)
    if state.over and not last and settings.policy == "act":
        state, pulled = _pull(state, evidence, settings, replay_room)
        actions |= pulled
    return concluded(state, evidence, actions)


def observed(state: GuardState, evidence: Sequence[Evidence]) -> tuple[GuardState, dict[str, str]]:
    """Count what a look has found, before any lever is pulled.

    Args:
        state: State before the look.
        evidence: See `decide`.

    Returns:
        The state with its counts, and by domain a warning if it was measured and is over its line.
    """
    over: dict[str, int] = {}
    hard: dict[str, int] = {}
    actions: dict[str, str] = {}
    for one in evidence:
        actions[one.domain] = "none"
        if one.age_steps:  # it was not measured at this look
            if one.domain in state.over:
                over[one.domain] = state.over[one.domain]
            if one.domain in state.hard:
                hard[one.domain] = state.hard[one.domain]
            continue
        if one.state == "red":
            over[one.domain] = state.over.get(one.domain, 0) + 1
            actions[one.domain] = "warn"
        if _above_hard_limit(one):
            hard[one.domain] = state.hard.get(one.domain, 0) + 1
    green = all(one.state == "green" for one in evidence)
    state = dataclasses.replace(state, over=over, hard=hard, idle=state.idle + 1, green=green)
    return state, actions


def concluded(
    state: GuardState, evidence: Sequence[Evidence], actions: Mapping[str, str]
) -> tuple[GuardState, Decision]:
    """Return the decision that consists of these actions, and the state after it."""
    decision = Decision(
        action=max(actions.values(), key=SEVERITY.index, default="none"),
        actions=dict(actions),
        reason=_reasons(evidence, actions),
    )
    if decision.action == "pause":
        state = dataclasses.replace(state, paused=decision.reason)
    return state, decision


def _pull(
    state: GuardState,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    replay_room: float,
) -> tuple[GuardState, dict[str, str]]:
    """Choose the lever: one rung per measurement, two where a hard limit is exceeded.

    Args:
        state: State after the measurement.
        evidence: See `decide`.
        settings: The run's guard section.
        replay_room: See `decide`.

    Returns:
        The state after the lever was pulled, and the action of each domain that it is pulled for.
    """
    measured = [one for one in evidence if not one.age_steps]
    beyond = [one.domain for one in measured if one.above(one.tolerance)]
    idle = state.idle
    pulled: dict[str, str] = {}
    if idle > 1 or beyond:
        raised = raised_shares(state, measured, settings, replay_room)
        if raised:
            state = dataclasses.replace(state, shares={**state.shares, **raised}, idle=0)
            pulled = dict.fromkeys(raised, "raise_replay")
    slowed_for = [one.domain for one in measured if _above_hard_limit(one)]
    if not slowed_for and not pulled and idle >= settings.patience:
        slowed_for = beyond
    if slowed_for and state.lr_scale > settings.min_lr_scale:
        lr_scale = max(settings.min_lr_scale, state.lr_scale * settings.lr_factor)
        state = dataclasses.replace(state, lr_scale=lr_scale, idle=0)
        pulled |= dict.fromkeys(slowed_for, "lower_lr")
    if pulled:
        return state, pulled
    paused_for = [domain for domain in beyond if _has_waited(domain, state, settings)]
    return state, dict.fromkeys(paused_for, "pause")


def _has_waited(domain: str, state: GuardState, settings: GuardSection) -> bool:
    """Return whether a domain has been without a lever for so long that the run pauses for it."""
    is_hard = state.hard.get(domain, 0) >= settings.pause_after
    return state.idle >= (settings.patience if is_hard else settings.pause_after)


def after_pause(
    state: GuardState, evidence: Sequence[Evidence], settings: GuardSection, *, replay_room: float
) -> GuardState:
    """Return the state with which a paused run goes on.

    The domains that suffered get more replay, and every count starts again. The measurements are
    still those of the pause (see `cpt.guard.guard.returned`).

    Args:
        state: The saved state; `over` names the domains that suffered.
        evidence: These domains with their shares, and the bounds of the pause.
        settings: The run's guard section.
        replay_room: See `decide`.
    """
    raised = raised_shares(state, evidence, settings, replay_room)
    return dataclasses.replace(
        state,
        shares={**state.shares, **raised},
        over={},
        hard={},
        idle=0,
        green=False,
        paused="",
        rollbacks=state.rollbacks + 1,
    )


def raised_shares(
    state: GuardState, evidence: Sequence[Evidence], settings: GuardSection, replay_room: float
) -> dict[str, float]:
    """Return the new shares of the domains whose turn it is.

    If there is too little room, each of them gets the same part of its growth.
    """
    present: dict[str, float] = {}
    growth: dict[str, float] = {}
    for one in evidence:
        is_due = state.over.get(one.domain, 0) > 1 or one.above(one.tolerance)
        if one.share is None or not is_due:
            continue
        wanted = max(one.share * settings.replay_factor, one.share + settings.replay_step)
        wanted = min(one.largest_share, wanted)
        if wanted > one.share:
            present[one.domain] = one.share
            growth[one.domain] = wanted - one.share
    total = sum(growth.values())
    if replay_room < MIN_REPLAY_ROOM or not total:
        return {}
    part = min(1.0, replay_room / total)
    return {domain: present[domain] + part * more for domain, more in growth.items()}


def _above_hard_limit(reading: Reading) -> bool:
    return reading.above(reading.hard_limit)


def _hard_by_domain(plain: Mapping[str, Any]) -> dict[str, int]:
    """Return the counts of domains from a state that has one count for all of them together.

    A domain can have been counted only if its newest reading is over its hard limit, and for no
    longer than it has been over its line. Before 0.2 the state had no readings.

    Args:
        plain: The state as it was written.
    """
    counts = {}
    for domain, looks in plain.get("over", {}).items():
        stored = plain.get("readings", {}).get(domain)
        is_hard = stored is None or _above_hard_limit(Reading.from_json(stored))
        if plain["hard"] and is_hard:
            counts[domain] = min(plain["hard"], looks)
    return counts


def _reasons(evidence: Sequence[Evidence], actions: Mapping[str, str]) -> str:
    reasons = []
    for one in evidence:
        if actions[one.domain] != "none":
            reasons.append(_reason(one, actions[one.domain]))
    return "; ".join(reasons)


def _reason(evidence: Evidence, action: str) -> str:
    unit = UNITS[evidence.kind]
    if evidence.lower_bound is None:
        loss = "not a number"
    elif evidence.lower_bound > 0 or evidence.delta is None:
        loss = f"at least {evidence.lower_bound:.2f} {unit} worse"
    elif evidence.delta < 0:
        loss = f"about {-evidence.delta:.2f} {unit} better"
    else:
        loss = f"about {evidence.delta:.2f} {unit} worse"
    return f"{evidence.domain} is {loss} (tolerance {evidence.tolerance:g} {unit}): {action}"
