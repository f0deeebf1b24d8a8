"""The starts of a run as its log tells them, and the steps at which it began again or went back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from cpt.telemetry.run_tally import number

MAX_MARKS = 40
"""Newest marks of a chart; more would be a hatching."""
MarkKind = Literal["start", "rollback", "stage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A step from which the run went on in another way than by the next step."""

    step: int
    """Optimizer steps done."""
    kind: MarkKind
    """`start`: a process began there; `rollback`: the run went back to it in mid run; `stage`: it
    goes on with rows of another length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One start of a run that reached its first step."""

    step: int
    """Optimizer steps done before."""
    began: float
    """Unix time of its first step; NaN if it is not known."""
    ended: float = math.nan
    """Unix time of its end, or of its last line; NaN while it goes on."""
    how: str = ""
    """How it ended; empty while it goes on."""


def marks(events: Iterable[Any]) -> list[Mark]:
    """Return the marks of the steps that count, in ascending order.

    Args:
        events: All lines of metrics.jsonl in order, including those that a resume took back.
    """
    found: dict[int, MarkKind] = {}
    last = -1
    for event in events:
        if not isinstance(event, dict) or type(event.get("step")) is not int:
            continue
        kind, step = event.get("event"), event["step"]
        if kind == "start" and last >= 0:
            if found.get(step) != "stage":
                found[step] = "start"
        elif kind == "stage":
            found[step] = "stage"
        elif kind == "rollback" and type(event.get("to_step")) is int:
            found[event["to_step"]] = "rollback"
        elif kind == "guard_rollback":
            found[step] = "rollback"
        elif kind == "step":
            if step <= last:
                found = {at: what for at, what in found.items() if at < step}
                # a log of an older version tells of no start
                found.setdefault(step - 1, "start")
            last = step
    return [Mark(step=step, kind=found[step]) for step in sorted(found)]


def starts(events: Iterable[Any]) -> list[Start]:
    """Return the starts of a run in order; those that reached no first step are not in its log."""
    found: list[Start] = []
    for event in events:
        if not isinstance(event, dict) or type(event.get("step")) is not int:
            continue
        kind = event.get("event")
        if kind == "start":
            if found and not found[-1].how:
                ended = number(event.get("previous_end"))
                found[-1] = replace(found[-1], ended=ended, how="ended without a word")
            found.append(Start(step=event["step"], began=number(event.get("time"))))
        elif kind == "end" and found:
            found[-1] = replace(found[-1], ended=number(event.get("time")), how=_how(event))
    return found


def _how(event: dict[str, Any]) -> str:
    """Return how a start ended, from its event `end`."""
    cause = event.get("cause")
    if isinstance(cause, str) and cause:
        return cause
    return f"after step {event['step']:,}, as it should"
