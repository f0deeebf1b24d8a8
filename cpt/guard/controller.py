"""The two-way controller: replay and learning rate follow what is measured, up and down.

    evidence -> loss of a domain -> step of its log-odds -> neediest domain of a source -> share

The law is proportional-integral in velocity form, for every domain measured at this look:

    loss   L   delta / tolerance, smoothed over looks (`MEMORY`)
    error  e   L - set_point
    step   dx  PROPORTIONAL * (L - L before) + INTEGRAL * e [|e| > DEAD_BAND],
               kept within -LARGEST_FALL and +LARGEST_RISE

dx is added to the log-odds of replay against the main language, log(share / main share), so that
equal steps matter equally at small and at large shares. The point estimate steers, because it is
right on average in both directions; the bounds only permit:

    - A source moves by the largest step of the domains that it serves: the neediest decides.
    - It falls only if all domains that it serves are green and the warm-up is over, and never below
      its least share. A reading that is older than the look moves nothing, but it must be green.
    - A change is applied, as one more segment of the mix ledger, only if it is larger than
      `MIN_MOVE` and `MOVE_PART` of the share, and than `REVERSAL` if the share last moved the other
      way. What is not applied is remembered (`GuardState.asked`).

Proven loss ("red") drives the rest, as on the ladder (cpt/guard/ladder.py). The learning rate falls
if a domain stays over its hard limit without recovering, or is over its tolerance with no replay
left, and rises back to the schedule after `SETTLED_LOOKS` looks at which the newest readings of all
domains, measured at the look or before, were green and below the set point. The run
pauses when a domain that is over its tolerance has no lever left and does not recover.

PI control of a constraint in place of dual ascent: Sohrabi et al. 2024, arXiv 2406.04558. The
constants were chosen on the plants of bench/guard_plants.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpt.config import GuardSection
from cpt.guard.ladder import Decision, GuardState, concluded, observed
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.yardstick import Evidence

PROPORTIONAL = 0.8
INTEGRAL = 0.08
DEAD_BAND = 0.15
"""Error, in tolerances, up to which the integral part rests."""
MEMORY = 0.6
"""Part of the smoothed loss that stays from look to look."""
LARGEST_RISE = 0.6
LARGEST_FALL = 0.12
"""Largest steps of the log-odds of one look."""
LEAST_LOSS = -1.0
LARGEST_LOSS = 10.0
"""Bounds on a loss in tolerances, so that one reading cannot leave a long memory."""
MIN_MOVE = 0.01
"""Smallest change of a share that is applied, in the predicted tokens."""
MOVE_PART = 0.1
"""Smallest change of a share that is applied, as a part of the share."""
REVERSAL = 0.35
"""Smallest change of the log-odds of a share that is applied when it goes back where it came from.
"""
LEAST_ASK = 0.005
"""Share from which the log-odds of a source without a share begin to rise."""
RECOVERY = 0.1
"""Fall of the smoothed loss, in tolerances, that counts as a recovery."""
SETTLED_LOOKS = 4
"""Green looks below the set point after which the learning rate rises again."""
KL_START = 1 / 16
"""Part of `guard.max_kl_weight` at which a weight of 0 begins to rise."""
ROUTER_STEP = 0.12
"""Least step of every source while routers have drifted too far and replay is to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What all parts of one decision read."""

    evidence: Sequence[Evidence]
    """Newest reading of every domain."""
    measured: Sequence[Evidence]
    """Those of this look."""
    steps: Mapping[str, float]
    """Step of the log-odds that each measured domain asks for."""
    settings: GuardSection
    limits: LeverLimits

    @property
    def is_green(self) -> bool:
        """Whether every domain is green."""
        return all(one.state == "green" for one in self.evidence)


def decide_two_way(
    state: GuardState,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    limits: LeverLimits,
    *,
    last: bool = False,
) -> tuple[GuardState, Decision]:
    """Return the next state and the decision; the arguments are those of `ladder.decide`."""
    state, actions = observed(state, evidence)
    if settings.policy != "act":  # a run that acts again must not go on from looks of long ago
        state = dataclasses.replace(state, smoothed={}, stuck={}, best={}, settled=0)
    if last or settings.policy != "act":
        return concluded(state, evidence, actions)
    measured = [one for one in evidence if not one.age_steps]
    smoothed, steps = _domain_steps(state, measured, settings.set_point)
    state = dataclasses.replace(state, smoothed=smoothed)
    look = _Look(
        evidence=evidence, measured=measured, steps=steps, settings=settings, limits=limits
    )
    state, kl_actions = _move_kl_weight(state, look)
    state, replay_actions = _move_replay(state, look)
    state, rate_actions = _answer_proven_loss(state, look, raised=replay_actions)
    for taken in (kl_actions, replay_actions, rate_actions):
        actions |= taken
    return concluded(state, evidence, actions)


def _domain_steps(
    state: GuardState, measured: Sequence[Evidence], set_point: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the smoothed loss of each domain, and the step that each measured one asks for."""
    smoothed = dict(state.smoothed)
    steps = {}
    for one in measured:
        if one.delta is None:  # a score is not a number
            steps[one.domain] = LARGEST_RISE
            continue
        loss = _clipped(one.delta / one.tolerance, LEAST_LOSS, LARGEST_LOSS)
        before = smoothed.get(one.domain, loss)
        now = MEMORY * before + (1 - MEMORY) * loss
        error = now - set_point
        step = PROPORTIONAL * (now - before)
        if abs(error) > DEAD_BAND:
            step += INTEGRAL * error
        smoothed[one.domain] = now
        steps[one.domain] = _clipped(step, -LARGEST_FALL, LARGEST_RISE)
    return smoothed, steps


def _move_replay(state: GuardState, look: _Look) -> tuple[GuardState, dict[str, str]]:
    """Move the shares of the replayed sources.

    Returns:
        The state with what was asked and applied, and the action of each domain that caused or
        allowed a change.
    """
    limits = look.limits
    steps = {name: _source_step(name, look, state) for name in limits.sources}
    asked = _asked_shares(state.asked, steps, limits)
    applied = {}
    headings = dict(state.headings)
    actions: dict[str, str] = {}
    for name, source in limits.sources.items():
        change = asked[name] - source.share
        turns_back = change * headings.get(name, 0) < 0
        if change > 0 and any(one.state == "red" for one in _served(name, look.evidence, limits)):
            turns_back = False  # a proven loss waits for nothing
        if asked[name] <= source.least:
            turns_back = False  # a share at its least cannot swing
        if not _is_noticeable(source.share, asked[name], turns_back=turns_back):
            continue
        applied[name] = asked[name]
        headings[name] = 1 if change > 0 else -1
        for one in _served(name, look.measured, limits):
            if change < 0:
                actions.setdefault(one.domain, "lower_replay")
            elif look.steps[one.domain] > 0:
                actions[one.domain] = "raise_replay"
    if not applied:
        return dataclasses.replace(state, asked=asked), {}
    replay = {name: source.share for name, source in limits.sources.items()}
    idle = 0 if "raise_replay" in actions.values() else state.idle
    # single sources take over from the shares of domains that a ladder may have left
    state = dataclasses.replace(
        state, asked=asked, replay=replay | applied, shares={}, headings=headings, idle=idle
    )
    return state, actions


def _served(source: str, evidence: Iterable[Evidence], limits: LeverLimits) -> list[Evidence]:
    return [one for one in evidence if source in limits.served_by.get(one.domain, ())]


def _source_step(source: str, look: _Look, state: GuardState) -> float:
    """Return the step of one source: that of the neediest domain that it serves."""
    limits = look.limits
    serving = _served(source, look.evidence, limits)
    measured = [look.steps[one.domain] for one in serving if one.domain in look.steps]
    step = max(measured, default=0.0)
    if step < 0 and (limits.is_warming_up or any(one.state != "green" for one in serving)):
        step = 0.0
    is_red = any(one.state == "red" for one in serving)
    if step > 0 and not is_red and _kl_weight_comes_first(state, look):
        step = 0.0
    if routers_drifted(look.settings, limits, "raise_replay"):
        step = max(step, ROUTER_STEP)
    return step


def _asked_shares(
    asked_before: Mapping[str, float], steps: Mapping[str, float], limits: LeverLimits
) -> dict[str, float]:
    """Return the share that is asked for each source.

    The log-odds of the sources that move are log(share / main share). The others keep their shares,
    so the main language has what is left: main = (1 - kept) / (1 + sum of the odds).
    """
    asked = {}
    for name, source in limits.sources.items():
        asked[name] = _clipped(asked_before.get(name, source.share), source.least, source.largest)
    present = math.fsum(source.share for source in limits.sources.values())
    other_replay = 1 - limits.main_share - present
    main = max(MIN_MOVE, 1 - other_replay - math.fsum(asked.values()))
    odds = {}
    kept = other_replay
    for name, step in steps.items():
        if step == 0:
            kept += asked[name]
        else:
            start = max(asked[name], LEAST_ASK) if step > 0 else asked[name]
            odds[name] = start / main * math.exp(step)
    main = max(0.0, 1 - kept) / (1 + math.fsum(odds.values()))
    for name, ratio in odds.items():
        source = limits.sources[name]
        asked[name] = _clipped(ratio * main, source.least, source.largest)
    growth = 0.0
    for name, source in limits.sources.items():
        growth += max(0.0, asked[name] - source.share)
    if growth > max(0.0, limits.room):
        part = max(0.0, limits.room) / growth
        for name, source in limits.sources.items():
            if asked[name] > source.share:
                asked[name] = source.share + part * (asked[name] - source.share)
    return asked


def _is_noticeable(share: float, asked: float, *, turns_back: bool = False) -> bool:
    """Return whether a change of a share is large enough to be applied."""
    if abs(asked - share) <= max(MIN_MOVE, MOVE_PART * share):
        return False
    return not turns_back or abs(_log_odds(asked) - _log_odds(share)) > REVERSAL


def _log_odds(share: float) -> float:
    share = _clipped(share, LEAST_ASK, 1 - LEAST_ASK)
    return math.log(share / (1 - share))


def _answer_proven_loss(
    state: GuardState, look: _Look, *, raised: Mapping[str, str]
) -> tuple[GuardState, dict[str, str]]:
    """Lower the learning rate or pause for what is surely lost; raise the rate when all is well.

    Args:
        state: The state after replay was moved.
        look: The look.
        raised: Actions of the move.

    Returns:
        The state, and the action of each domain.
    """
    settings = look.settings
    beyond = [one for one in look.measured if one.above(one.tolerance)]
    recovering = _recovering(state, beyond)
    state = _count_stuck(state, look, beyond, helped={*recovering, *_raised(raised)})
    too_far = []
    for one in beyond:
        is_lasting = state.hard.get(one.domain, 0) > 1 and one.domain not in recovering
        if one.above(one.hard_limit) and (is_lasting or one.delta is None):
            too_far.append(one.domain)
    without_replay = [one.domain for one in beyond if not _has_replay_left(one.domain, state, look)]
    if state.lr_scale > settings.min_lr_scale:
        waited = [name for name in without_replay if state.stuck[name] >= settings.patience]
        slowed_for = [one.domain for one in beyond if one.domain in {*too_far, *waited}]
        if slowed_for:
            lr_scale = max(settings.min_lr_scale, state.lr_scale * settings.lr_factor)
            state = dataclasses.replace(
                state, lr_scale=lr_scale, idle=0, stuck={}, best={}, settled=0
            )
            return state, dict.fromkeys(slowed_for, "lower_lr")
    paused_for = [name for name in without_replay if _has_waited(name, state, settings)]
    if paused_for:
        return state, dict.fromkeys(paused_for, "pause")
    return _raise_rate(state, look)


def _has_waited(domain: str, state: GuardState, settings: GuardSection) -> bool:
    """Return whether a domain without a lever has not recovered for so long that the run pauses."""
    wait = settings.pause_after
    if state.hard.get(domain, 0) >= settings.pause_after:
        wait = min(wait, settings.patience)
    return state.stuck[domain] >= wait


def _raised(actions: Mapping[str, str]) -> list[str]:
    return [domain for domain, action in actions.items() if action == "raise_replay"]


def _recovering(state: GuardState, beyond: Sequence[Evidence]) -> set[str]:
    """Return the domains over their tolerance whose loss has fallen noticeably."""
    recovering = set()
    for one in beyond:
        lowest = state.best.get(one.domain)
        if lowest is None or one.delta is None:
            continue
        if state.smoothed[one.domain] < lowest - RECOVERY:
            recovering.add(one.domain)
    return recovering


def _count_stuck(
    state: GuardState, look: _Look, beyond: Sequence[Evidence], *, helped: set[str]
) -> GuardState:
    """Count, for each domain over its tolerance, the looks without a lever or a recovery.

    Args:
        state: The state before the count.
        look: The look.
        beyond: The measured domains over their tolerance.
        helped: Those whose count starts again.
    """
    stuck = {}
    best = {}
    measured = {one.domain for one in look.measured}
    for domain, count in state.stuck.items():
        if domain not in measured:  # its last reading still stands
            stuck[domain] = count
            best[domain] = state.best[domain]
    for one in beyond:
        if one.domain in helped or one.domain not in state.best:
            stuck[one.domain] = 0
            best[one.domain] = state.smoothed.get(one.domain, LARGEST_LOSS)
        else:
            stuck[one.domain] = state.stuck[one.domain] + 1
            best[one.domain] = state.best[one.domain]
    return dataclasses.replace(state, stuck=stuck, best=best)


def _has_replay_left(domain: str, state: GuardState, look: _Look) -> bool:
    """Return whether the share of a source that serves a domain may still rise noticeably."""
    for name in look.limits.served_by.get(domain, ()):
        source = look.limits.sources[name]
        largest = min(source.largest, source.share + look.limits.room)
        if largest > source.share and _is_noticeable(source.share, largest):
            return True
    return False


def _raise_rate(state: GuardState, look: _Look) -> tuple[GuardState, dict[str, str]]:
    """Bring the learning rate back towards the schedule's after enough looks of peace."""
    settings = look.settings
    is_low = all(_newest_loss(one, state) < settings.set_point for one in look.evidence)
    is_calm = look.is_green and is_low and not look.limits.is_warming_up
    settled = state.settled + 1 if is_calm else 0
    if settled < SETTLED_LOOKS or state.lr_scale >= 1:
        return dataclasses.replace(state, settled=settled), {}
    lr_scale = min(1.0, state.lr_scale / settings.lr_factor)
    state = dataclasses.replace(state, lr_scale=lr_scale, settled=0)
    return state, {one.domain: "raise_lr" for one in look.measured}


def _newest_loss(one: Evidence, state: GuardState) -> float:
    """Return the loss of a domain in tolerances, smoothed if this run has looked at it before."""
    if one.domain in state.smoothed:
        return state.smoothed[one.domain]
    return LARGEST_LOSS if one.delta is None else one.delta / one.tolerance


def _kl_weight(state: GuardState, limits: LeverLimits) -> float | None:
    """Return the present weight of the divergence; None without targets."""
    if limits.kl_weight is None or state.kl_weight is None:
        return limits.kl_weight
    return state.kl_weight


def _kl_weight_comes_first(state: GuardState, look: _Look) -> bool:
    """Return whether replay waits, because the weight of the divergence can still rise."""
    weight = _kl_weight(state, look.limits)
    is_first = look.settings.kl_lever == "before"
    return is_first and weight is not None and weight < look.settings.max_kl_weight


def _move_kl_weight(state: GuardState, look: _Look) -> tuple[GuardState, dict[str, str]]:
    """Move the weight of the divergence from the base model (`train.kl_targets`).

    It acts on the whole model, so the neediest of all measured domains moves it. If it comes before
    replay, it falls after replay has fallen to its least.
    """
    settings, limits = look.settings, look.limits
    weight = _kl_weight(state, limits)
    if settings.kl_lever == "off" or weight is None or limits.kl_weight is None or not look.steps:
        return state, {}
    step = max(look.steps.values())
    after = weight
    if step > 0:
        start = max(weight, settings.max_kl_weight * KL_START)
        after = min(settings.max_kl_weight, start * math.exp(step))
    elif step < 0 and _kl_weight_may_fall(look):
        after = max(limits.kl_weight, weight * math.exp(step))
    if after == weight:
        return state, {}
    state = dataclasses.replace(state, kl_weight=after)
    if after < weight:
        return state, dict.fromkeys(look.steps, "lower_kl")
    needy = [domain for domain, own in look.steps.items() if own > 0]
    return dataclasses.replace(state, idle=0), dict.fromkeys(needy, "raise_kl")


def _kl_weight_may_fall(look: _Look) -> bool:
    if not look.is_green or look.limits.is_warming_up:
        return False
    return look.settings.kl_lever == "beside" or _replay_is_least(look.limits)


def _replay_is_least(limits: LeverLimits) -> bool:
    return not any(_is_noticeable(source.share, source.least) for source in limits.sources.values())


def routers_drifted(settings: GuardSection, limits: LeverLimits, lever: str) -> bool:
    """Return whether the routers have drifted below the line that this lever answers."""
    if settings.router_lever != lever or limits.router_overlap is None:
        return False
    return limits.router_overlap < settings.least_router_overlap


def replay_after_pause(
    state: GuardState, suffering: Sequence[Evidence], limits: LeverLimits
) -> dict[str, float]:
    """Return the shares of the replayed sources with which a paused run goes on.

    Every source that serves a domain that suffered gets the largest rise of one look.
    """
    steps = {}
    for name in limits.sources:
        steps[name] = LARGEST_RISE if _served(name, suffering, limits) else 0.0
    return _asked_shares({}, steps, limits)


def _clipped(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))
