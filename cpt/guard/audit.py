"""`cpt guard audit`: make every decision of a run again from what it left, and compare.

    baselines + scores-*.json + state  ->  readings   ==  the evidence in metrics.jsonl
    evidence + state + settings        ->  decisions  ==  the decisions in metrics.jsonl

Each yardstick's judge repeats its own part (cpt/guard/yardstick.py). The state before a decision
must also be known: the state after an earlier decision, or the one that a rollback noted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.config import DomainLimits, GuardSection
from cpt.errors import ConfigError, InternalError
from cpt.guard.decision import decide
from cpt.guard.generation.judge import GenerationJudge
from cpt.guard.guard import judged, restarted
from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.text_judge import USED, TextJudge
from cpt.guard.traces.judge import TraceJudge
from cpt.guard.yardstick import Evidence, Judge, Kind, Look
from cpt.telemetry.event_reader import iter_events
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.console.progress import show_progress

TOLERANCE = 1e-9
"""Relative difference between two bounds that counts as none. JSON keeps a bound exactly, so only
the order of a library's sums can differ.
"""

OLD_COUNTS = (
    " The decision is of a version that counted looks over the hard limit for all domains "
    "together, and raised the rate by the domains of a look alone; that may be the reason."
)
"""What is added to the last problem of such a decision."""

FORGOTTEN_BY_WARN = ("smoothed", "stuck", "best", "settled")
"""What the two-way law remembers from look to look. A guard that only warns forgets it; at first it
kept it."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedDecision:
    """One decision of a run, and whether it follows from its evidence."""

    step: int
    """Optimizer steps done."""
    action: str
    """Action that was taken."""
    reason: str
    """Reason that was given."""
    bounds_checked: bool
    """Whether the scores were still there, so that the readings could be computed again too; those
    of decisions before 0.2 cannot.
    """
    problems: list[str]
    """Everything that does not agree; empty if all does."""


def audit(run_dir: Path) -> list[AuditedDecision]:
    """Make every decision of a run again.

    Raises:
        ConfigError: the directory holds no metrics, or no decision of a guard.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(
            f"{run_dir} holds no metrics.jsonl, so it is no run directory. Give another with "
            "--run_dir."
        )
    judges = stored_judges(run_dir / "guard")
    known_states: list[GuardState] = []
    audited = []
    kinds = ("guard_rollback", "guard_restored", "guard_decision")
    with show_progress(None, "audit", "decision") as bar:
        for event in iter_events(metrics, kinds):
            if event["event"] == "guard_decision":
                audited.append(_audit_decision(event, run_dir, judges, known_states))
            known_states.append(_without_step(GuardState.from_json(event["after"])))
            bar.update()
    if not audited:
        raise ConfigError(
            f"{metrics} holds no decision: the guard of this run has measured nothing after step 0."
        )
    return audited


def check_agreement(audited: list[AuditedDecision]) -> str:
    """Return a table of the decisions for people.

    Raises:
        InternalError: a decision does not follow from what the run left.
    """
    lines = []
    disagreements = []
    num_unchecked = 0
    for one in audited:
        agrees = "DOES NOT AGREE" if one.problems else "agrees"
        lines.append(f"  step {one.step:>8}  {one.action:<13} {agrees:<15} {one.reason}")
        for problem in one.problems:
            disagreements.append(f"step {one.step}: {problem}")
        num_unchecked += not one.bounds_checked
    if disagreements:
        lines.append(f"{len(disagreements)} disagreements:")
        raise InternalError("\n".join(lines + disagreements))
    summary = f"{len(audited)} decisions, all follow from their evidence"
    if num_unchecked:
        summary += (
            f"; the scores of {num_unchecked} are gone or of an older version, so their bounds "
            "were taken from the log"
        )
    return "\n".join([*lines, summary])


def stored_judges(folder: Path) -> dict[Kind, Judge]:
    """Return the judge of every kind of yardstick, with the baselines that a run has kept.

    Args:
        folder: <run_dir>/guard.
    """
    return {
        "text": TextJudge.stored(folder),
        "generation": GenerationJudge.stored(folder),
        "traces": TraceJudge(),
    }


def _audit_decision(
    event: Json, run_dir: Path, judges: dict[Kind, Judge], known_states: list[GuardState]
) -> AuditedDecision:
    before = GuardState.from_json(event["before"])
    logged = GuardState.from_json(event["after"])
    settings = _settings(event["settings"])
    evidence = _evidence(event, settings)
    problems = []
    if _without_step(before) not in known_states and not _is_start(before):
        problems.append("the state before it does not follow any earlier decision.")
    seen = _with_readings(before, evidence)
    scores = run_dir / "guard" / Path(event["scores"]).name
    scores_checked = scores.is_file() and not _is_old(event)
    if scores_checked:
        stored = read_json(scores, LARGE_BYTES, follow_links=False)
        look = Look(step=event["step"], last=event["last"], settings=settings, **stored["look"])
        seen, _ = judged(judges, stored["yardsticks"], before, look)
        problems += _reading_problems(seen, evidence)
    decided, decision = decide(seen, evidence, settings, _limits(event), last=event["last"])
    after = restarted(judges, decided, decision)
    if settings.policy != "act" and _kept_as_of_old(before, logged):
        after = replace(after, **{name: getattr(logged, name) for name in FORGOTTEN_BY_WARN})
    actions = dict(decision.actions)
    if decision.action != event["action"] or actions != event["actions"]:
        problems.append(f"the action was {event['actions']}, but {actions} follows.")
    if scores_checked:
        after = _without_unlogged(after, logged)
    else:
        after = replace(after, yardsticks=logged.yardsticks, readings=logged.readings)
    problems += _state_problems(after, event["after"])
    if problems and isinstance(event["after"].get("hard"), int):
        problems[-1] += OLD_COUNTS
    return AuditedDecision(
        step=event["step"],
        action=event["action"],
        reason=event["reason"],
        bounds_checked=scores_checked,
        problems=problems,
    )


def _kept_as_of_old(before: GuardState, logged: GuardState) -> bool:
    """Return whether a decision left what the law remembers as it was: a version that kept it."""
    return all(getattr(before, name) == getattr(logged, name) for name in FORGOTTEN_BY_WARN)


def _is_start(state: GuardState) -> bool:
    """Return whether it is the state before the first decision.

    A run with `guard.baseline_model` may start from a model that is not green, and knows what was
    measured of it (`Guard._note_start`).
    """
    states = []
    for reading in state.readings.values():
        if reading["step"]:
            return False
        states.append(reading["state"])
    is_green = state.green and set(states) <= {"green"}
    start = GuardState(green=is_green, readings=state.readings)
    return _without_step(state) == start


def _is_old(event: Json) -> bool:
    """Return whether a decision was made before 0.2: on the bounds of another test."""
    return any("state" not in one for one in event["evidence"])


def _evidence(event: Json, settings: GuardSection) -> list[Evidence]:
    """Return the evidence of a decision; before 0.2 a domain was green if it was not red."""
    evidence = []
    for plain in event["evidence"]:
        one = Evidence.from_json(plain)
        if "state" not in plain:
            is_red = one.above(settings.act_at * one.tolerance)
            one = replace(one, state="red" if is_red else "green", step=event["step"])
        evidence.append(one)
    return evidence


def _settings(stored: Json) -> GuardSection:
    domains = {}
    for name, limits in stored["domains"].items():
        domains[name] = DomainLimits(**limits)
    # before 0.2 the ladder was the only law
    return GuardSection(**{"controller": "ladder", **stored, "domains": domains})


def _limits(event: Json) -> LeverLimits:
    """Return the limits of the levers; before 0.2 the room for replay was the only one."""
    if "limits" in event:
        return LeverLimits.from_json(event["limits"])
    return LeverLimits(room=event["replay_room"])


def _with_readings(state: GuardState, evidence: list[Evidence]) -> GuardState:
    """Return the state with the readings that were logged."""
    readings = dict(state.readings)
    for one in evidence:
        readings[one.domain] = one.reading().to_json()
    return replace(state, readings=readings)


def _reading_problems(seen: GuardState, evidence: list[Evidence]) -> list[str]:
    """Compare the readings that follow from stored scores with the evidence."""
    problems = []
    for one in evidence:
        follows = seen.readings.get(one.domain)
        if follows is None:
            problems.append(f"{one.domain} has no score.")
            continue
        logged = one.reading().to_json()
        for name, value in follows.items():
            if not _same(value, logged[name]):
                problems.append(
                    f"the {name} of {one.domain} was {logged[name]}, but {value} follows from its "
                    "scores."
                )
    return problems


def _state_problems(follows: GuardState, stored: Json) -> list[str]:
    """Compare the state that follows with the one that was logged."""
    expected = _without_step(follows).to_json()
    logged = _without_step(GuardState.from_json(stored)).to_json()
    if isinstance(stored.get("hard"), int):  # one count for all domains is the largest of theirs
        expected["hard"] = max(follows.hard.values(), default=0)
        logged["hard"] = stored["hard"]
    problems = []
    for name, value in expected.items():
        if not _same(value, logged[name]):
            problems.append(f"{name} became {logged[name]}, but {value} follows.")
    return problems


def _without_unlogged(after: GuardState, logged: GuardState) -> GuardState:
    """Drop which fresh documents were used, if a log does not note that yet."""
    text = {}
    for name, known in after.yardsticks.get("text", {}).items():
        noted = logged.yardsticks.get("text", {}).get(name, {})
        kept = {key: value for key, value in known.items() if key != USED or USED in noted}
        if kept or noted:
            text[name] = kept
    if "text" not in after.yardsticks:
        return after
    return replace(after, yardsticks={**after.yardsticks, "text": text})


def _same(computed: Any, logged: Any) -> bool:
    """Return whether two JSON values are equal but for the last digits of floating point."""
    if isinstance(computed, dict) and isinstance(logged, dict):
        if computed.keys() != logged.keys():
            return False
        return all(_same(value, logged[name]) for name, value in computed.items())
    if isinstance(computed, list) and isinstance(logged, list):
        if len(computed) != len(logged):
            return False
        return all(map(_same, computed, logged))
    if isinstance(computed, float) and isinstance(logged, float | int):
        return math.isclose(computed, logged, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(computed == logged)


def _without_step(state: GuardState) -> GuardState:
    """Drop `green_step`, which a saved checkpoint sets between two decisions."""
    return replace(state, green_step=None)
