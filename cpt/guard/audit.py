"""`cpt guard audit`: make every decision of a run again from what it left, and compare.

    baseline.json + scores-*.json  ->  bounds     ==  the bounds in metrics.jsonl
    bounds + state + settings      ->  decisions  ==  the decisions in metrics.jsonl

The state before a decision must also be known: the state after an earlier decision, or the one that
a rollback noted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.config import DomainLimits, GuardSection
from cpt.errors import ConfigError, InternalError
from cpt.guard.ladder import Evidence, GuardState, decide
from cpt.guard.paired_test import compare_scores
from cpt.guard.score import DomainScore, as_floats
from cpt.telemetry.metrics import read_events

TOLERANCE = 1e-9
"""Relative difference between two bounds that counts as none. JSON keeps a bound exactly, so only
the order of a library's sums can differ.
"""

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
    """Whether the scores were still there, so that the bounds could be computed again too."""
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
    baseline = _read_baseline(run_dir / "guard" / "baseline.json")
    known_states = [_without_step(GuardState().to_json())]
    audited = []
    for event in read_events(metrics):
        if event.get("event") == "guard_rollback":
            known_states.append(_without_step(event["after"]))
        elif event.get("event") == "guard_decision":
            audited.append(_audit_decision(event, run_dir, baseline, known_states))
            known_states.append(_without_step(event["after"]))
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
            f"; the scores of {num_unchecked} are gone, so their bounds were taken from the log"
        )
    return "\n".join([*lines, summary])


def _audit_decision(
    event: Json, run_dir: Path, baseline: dict[str, DomainScore], known_states: list[Json]
) -> AuditedDecision:
    evidence = list(map(Evidence.from_json, event["evidence"]))
    problems = []
    if _without_step(event["before"]) not in known_states:
        problems.append("the state before it does not follow any earlier decision.")
    after, decision = decide(
        GuardState.from_json(event["before"]),
        evidence,
        _settings(event["settings"]),
        replay_room=event["replay_room"],
        last=event["last"],
    )
    actions = dict(decision.actions)
    if decision.action != event["action"] or actions != event["actions"]:
        problems.append(f"the action was {event['actions']}, but {actions} follows.")
    if after.to_json() != event["after"]:
        problems.append(f"the state became {event['after']}, but {after.to_json()} follows.")
    scores = run_dir / "guard" / Path(event["scores"]).name
    bounds_checked = scores.is_file()
    if bounds_checked:
        stored = json.loads(scores.read_text(encoding="utf-8"))
        problems += _bound_problems(stored, baseline, evidence)
    return AuditedDecision(
        step=event["step"],
        action=event["action"],
        reason=event["reason"],
        bounds_checked=bounds_checked,
        problems=problems,
    )


def _settings(stored: Json) -> GuardSection:
    domains = {}
    for name, limits in stored["domains"].items():
        domains[name] = DomainLimits(**limits)
    return GuardSection(**{**stored, "domains": domains})


def _bound_problems(
    stored: Json, baseline: dict[str, DomainScore], evidence: list[Evidence]
) -> list[str]:
    """Compute the bounds again from stored scores and compare them with the evidence."""
    problems = []
    for one in evidence:
        before = baseline[one.domain]
        after = replace(before, nats=as_floats(stored["nats"][one.domain]))
        bound = compare_scores(after, before, stored["num_tests"]).finite_bound
        if not _same_bound(bound, one.lower_bound):
            problems.append(
                f"the bound of {one.domain} was {one.lower_bound}, but {bound} follows from its "
                "scores."
            )
    return problems


def _same_bound(computed: float | None, logged: float | None) -> bool:
    if computed is None or logged is None:
        return computed is logged
    return math.isclose(computed, logged, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _read_baseline(path: Path) -> dict[str, DomainScore]:
    if not path.is_file():
        return {}
    scores = {}
    for name, plain in json.loads(path.read_text(encoding="utf-8")).items():
        scores[name] = DomainScore.from_json(name, plain)
    return scores


def _without_step(state: Json) -> Json:
    """Drop `green_step`, which a saved checkpoint sets between two decisions."""
    return {key: value for key, value in state.items() if key != "green_step"}
