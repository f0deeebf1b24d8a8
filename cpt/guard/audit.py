"""`cpt guard replay`: every decision of a run made again from what it left, and compared.

baseline.json + scores-*.json  ->  bounds     ==  the bounds in metrics.jsonl
bounds + state + settings      ->  decisions  ==  the decisions in metrics.jsonl
each state                     ==  the state after an earlier decision, a checkpoint's note or a rollback
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
from cpt.guard.paired_test import judge
from cpt.guard.score import DomainScore, as_floats
from cpt.telemetry.metrics import read_events

TOLERANCE = 1e-9
"""Relative; a bound goes through JSON and back unchanged, so all that differs is the order of a
library's sums.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One decision, made again."""

    step: int
    """Optimizer steps done."""
    action: str
    """What was done."""
    reason: str
    """Why."""
    bounds_checked: bool
    """Whether the scores were still there, so that the bounds could be computed again too."""
    problems: list[str]
    """What does not agree; empty if all does."""


def replay(run_dir: Path) -> list[Replayed]:
    """Make every decision of a run again.

    Raises:
        ConfigError: the directory holds no metrics, or no decision of a guard.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(
            f"{run_dir} holds no metrics.jsonl, so it is no run directory. Give another with --run_dir."
        )
    baseline = _baseline(run_dir / "guard" / "baseline.json")
    known, results = [_without_step(GuardState().to_json())], []
    for event in read_events(metrics):
        if event.get("event") == "guard_rollback":
            known.append(_without_step(event["after"]))
        elif event.get("event") == "guard_decision":
            results.append(_again(event, run_dir, baseline, known))
            known.append(_without_step(event["after"]))
    if not results:
        raise ConfigError(
            f"{metrics} holds no decision: the guard of this run has measured nothing after step 0."
        )
    return results


def check(results: list[Replayed]) -> str:
    """A table for people.

    Raises:
        InternalError: a decision does not follow from what the run left.
    """
    lines = [
        f"  step {r.step:>8}  {r.action:<13} {'agrees' if not r.problems else 'DOES NOT AGREE':<15} {r.reason}"
        for r in results
    ]
    wrong = [f"step {r.step}: {problem}" for r in results for problem in r.problems]
    if wrong:
        raise InternalError("\n".join([*lines, f"{len(wrong)} disagreements:", *wrong]))
    unseen = sum(not r.bounds_checked for r in results)
    note = (
        f"; the scores of {unseen} are gone, their bounds were taken from the log" if unseen else ""
    )
    return "\n".join([*lines, f"{len(results)} decisions, all follow from their evidence{note}"])


def _again(
    event: dict[str, Any], run_dir: Path, baseline: dict[str, DomainScore], known: list[Any]
) -> Replayed:
    evidence = [Evidence.from_json(plain) for plain in event["evidence"]]
    state, problems = GuardState.from_json(event["before"]), []
    if _without_step(event["before"]) not in known:
        problems.append("the state before it is that after no earlier decision.")
    settings = dict(event["settings"])
    settings["domains"] = {
        name: DomainLimits(**limits) for name, limits in settings["domains"].items()
    }
    after, decision = decide(
        state,
        evidence,
        GuardSection(**settings),
        replay_room=event["replay_room"],
        last=event["last"],
    )
    if (decision.action, dict(decision.actions)) != (event["action"], event["actions"]):
        problems.append(f"the action was {event['actions']}, but {dict(decision.actions)} follows.")
    if after.to_json() != event["after"]:
        problems.append(f"the state became {event['after']}, but {after.to_json()} follows.")
    scores = run_dir / "guard" / Path(event["scores"]).name
    checked = scores.is_file()
    if checked:
        problems += _bound_problems(
            json.loads(scores.read_text(encoding="utf-8")), baseline, evidence
        )
    return Replayed(
        step=event["step"],
        action=event["action"],
        reason=event["reason"],
        bounds_checked=checked,
        problems=problems,
    )


def _bound_problems(
    stored: dict[str, Any], baseline: dict[str, DomainScore], evidence: list[Evidence]
) -> list[str]:
    problems = []
    for e in evidence:
        before = baseline[e.domain]
        now = replace(before, nats=as_floats(stored["nats"][e.domain]))
        bound = judge(now, before, stored["num_tests"]).decided_on
        if not _same(bound, e.lower_bound):
            problems.append(
                f"the bound of {e.domain} was {e.lower_bound}, but {bound} follows from its scores."
            )
    return problems


def _same(bound: float | None, said: float | None) -> bool:
    if bound is None or said is None:
        return bound is said
    return math.isclose(bound, said, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _baseline(path: Path) -> dict[str, DomainScore]:
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: DomainScore.from_json(name, plain) for name, plain in stored.items()}


def _without_step(state: dict[str, Any]) -> dict[str, Any]:
    """A saved checkpoint notes its own step between two decisions."""
    return {key: value for key, value in state.items() if key != "green_step"}
