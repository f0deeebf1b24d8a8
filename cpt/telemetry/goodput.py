"""Where the time of a run went, over all its starts, from metrics.jsonl.

    productive   steps whose update is part of the weights now, without their wait for data
    start_up     from the process's start to the first step, first start only
    data_wait    reading rows while nothing else went on
    save_wait    training standing still for a checkpoint
    evaluation   scoring held-out text
    skipped      steps whose update was not applied, because something was not finite
    rollback     loading a checkpoint in mid run, and steps that this took back
    restart      from the last line of one start to the first step of the next, and steps that were done again
    other        what is left of the time between start and end: logging, hooks, the scheduler of the machine

Events that carry it: `start` (time, start_up_seconds, previous_end), `step` (seconds), `data_wait`,
`checkpoint` (blocked_seconds, or seconds), `evaluation`, `skipped_update`, `rollback`, `end`
(time).  Times are those of rank 0.  A start that was killed ends with its last line, which the next
start knows from the file's time stamp.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cpt.resilience.processes import age_seconds

LOST = (
    "start_up",
    "data_wait",
    "save_wait",
    "evaluation",
    "skipped",
    "rollback",
    "restart",
    "other",
)
"""Kinds of lost time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Seconds of a run by what they were spent on."""

    productive: float
    """Seconds of steps that count."""
    lost: dict[str, float]
    """Seconds by the kinds of `LOST`."""
    num_starts: int
    """Times the run was started and reached its first step."""

    @property
    def total(self) -> float:
        """All seconds."""
        return self.productive + sum(self.lost.values())

    @property
    def share(self) -> float:
        """Productive share of all time; NaN for a run without time."""
        return self.productive / self.total if self.total > 0 else math.nan

    def describe(self) -> str:
        """One line for people."""
        lost = ", ".join(
            f"{kind.replace('_', '-')} {seconds:.1f} s"
            for kind, seconds in self.lost.items()
            if seconds
        )
        return f"goodput {100 * self.share:.1f} %: {self.productive:.1f} of {self.total:.1f} s; lost: {lost or 'nothing'}"

    def event(self, step: int) -> dict[str, Any]:
        """For metrics.jsonl: cumulative over all starts of the run."""
        seconds = {"productive": self.productive, **self.lost}
        return {
            "event": "goodput",
            "step": step,
            "goodput": self.share,
            "starts": self.num_starts,
            "seconds": seconds,
        }


@dataclass(kw_only=True, slots=True)
class _Step:
    seconds: float
    data_wait: float = 0.0
    skipped: bool = False


@dataclass(kw_only=True)
class _Account:
    """Reads events in the order in which they were written."""

    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOST, 0.0))
    steps: dict[int, _Step] = field(default_factory=dict)
    starts: int = 0
    began_at: float | None = None
    """Wall time at which the process of the present start began."""
    known_before: float = 0.0
    """Seconds accounted for when it began."""
    reason: str = "restart"
    """What steps that are done again are put down to."""

    def take(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def accounted(self) -> float:
        return sum(self.lost.values()) + sum(step.seconds for step in self.steps.values())

    def _on_start(self, event: dict[str, Any]) -> None:
        now, start_up, previous = (
            _seconds(event.get(key)) for key in ("time", "start_up_seconds", "previous_end")
        )
        if self.starts and previous:
            self._settle(previous)
        self.known_before = self.accounted()
        self.began_at = now - start_up
        if self.starts or previous:
            self.lost["restart"] += start_up + max(0.0, self.began_at - previous)
            self.began_at = min(self.began_at, previous)
        else:
            self.lost["start_up"] += start_up
        self.starts += 1
        self.reason = "restart"

    def _on_step(self, event: dict[str, Any]) -> None:
        step = event["step"]
        for taken_back in [known for known in self.steps if known >= step]:
            self.lost[self.reason] += self.steps.pop(taken_back).seconds
        self.steps[step] = _Step(seconds=_seconds(event.get("seconds")))

    def _on_data_wait(self, event: dict[str, Any]) -> None:
        if event["step"] in self.steps:
            self.steps[event["step"]].data_wait = _seconds(event.get("seconds"))

    def _on_skipped_update(self, event: dict[str, Any]) -> None:
        if event["step"] in self.steps:
            self.steps[event["step"]].skipped = True

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.lost["save_wait"] += _seconds(event.get("blocked_seconds", event.get("seconds")))

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self.lost["evaluation"] += _seconds(event.get("seconds"))

    def _on_rollback(self, event: dict[str, Any]) -> None:
        self.lost["rollback"] += _seconds(event.get("seconds"))
        self.reason = "rollback"

    def _on_end(self, event: dict[str, Any]) -> None:
        self._settle(_seconds(event.get("time")))

    def _settle(self, ended_at: float) -> None:
        """What the present start has not accounted for is `other`."""
        if self.began_at is not None:
            self.lost["other"] += max(
                0.0, ended_at - self.began_at - (self.accounted() - self.known_before)
            )
        self.began_at = None

    def result(self) -> Goodput:
        lost = dict(self.lost)
        lost["data_wait"] += sum(step.data_wait for step in self.steps.values() if not step.skipped)
        lost["skipped"] += sum(step.seconds for step in self.steps.values() if step.skipped)
        productive = sum(
            step.seconds - step.data_wait for step in self.steps.values() if not step.skipped
        )
        return Goodput(productive=productive, lost=lost, num_starts=self.starts)


def goodput(events: Iterable[Any]) -> Goodput:
    """Account for the time of a run.

    Args:
        events: All lines of metrics.jsonl in order, those that a resume took back included.
    """
    account = _Account()
    for event in events:
        if (
            isinstance(event, dict)
            and isinstance(event.get("event"), str)
            and type(event.get("step")) is int
        ):
            account.take(event)
    return account.result()


def start_event(step: int, previous_end: float | None) -> dict[str, Any]:
    """The event of a start that is about to do its first step.

    Args:
        step: Steps done.
        previous_end: When the last line of metrics.jsonl was written; None for a run's first start.
    """
    known = {"previous_end": previous_end} if previous_end is not None else {}
    return {
        "event": "start", "step": step, "time": time.time(), "start_up_seconds": age_seconds(), **known
    }  # fmt: skip


def _seconds(value: object) -> float:
    """A duration or time from a file; 0 for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return max(0.0, float(value)) if number and math.isfinite(value) else 0.0  # type: ignore[arg-type]
