"""The account of a run's time over all its starts, from metrics.jsonl.

    productive   steps whose update is part of the weights now, without their wait for data
    start_up     from the process's start to the first step, first start only
    data_wait    reading rows while nothing else went on
    save_wait    training standing still for a checkpoint
    evaluation   scoring held-out text
    skipped      steps whose update was not applied, because something was not finite
    rollback     loading a checkpoint in mid run, and steps that this took back
    restart      from the last line of one start to the first step of the next, and steps that were
                 done again
    other        the rest of the time between start and end: logging, hooks, the machine's scheduler

Events that carry it: `start` (time, start_up_seconds, previous_end), `step` (seconds), `data_wait`,
`save_wait`, `checkpoint` (blocked_seconds, or seconds; update_wait_seconds), `evaluation`,
`skipped_update`, `rollback`, `end` (time).  Times are those of rank 0.  A start that was killed
ends with its last line, which the next start knows from the file's time stamp.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
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
"""Kinds of lost time, in the order in which they are shown."""


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
        """Seconds of all starts together."""
        return self.productive + sum(self.lost.values())

    @property
    def share(self) -> float:
        """Productive share of all time; NaN for a run without time."""
        return self.productive / self.total if self.total > 0 else math.nan

    def describe(self) -> str:
        """Return one line for people."""
        lost = []
        for kind, seconds in self.lost.items():
            if seconds:
                lost.append(f"{kind.replace('_', '-')} {seconds:.1f} s")
        return (
            f"goodput {100 * self.share:.1f} %: {self.productive:.1f} of {self.total:.1f} s; "
            f"lost: {', '.join(lost) or 'nothing'}"
        )

    def event(self, step: int) -> dict[str, Any]:
        """Return the event for metrics.jsonl, cumulative over all starts of the run."""
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
    save_wait: float = 0.0
    skipped: bool = False


@dataclass(kw_only=True)
class GoodputAccount:
    """An account that is kept by taking events in the order in which they were written."""

    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOST, 0.0))
    steps: dict[int, _Step] = field(default_factory=dict)
    last_step: int = -1
    """Newest of `steps`."""
    starts: int = 0
    began_at: float | None = None
    """Wall time at which the process of the present start began."""
    ended_at: float | None = None
    """Wall time of the newest end; None before the first."""
    known_before: float = 0.0
    """Seconds accounted for when it began."""
    reason: str = "restart"
    """Kind of loss that steps which are done again count as."""

    def take(self, event: Any) -> None:
        """Take the next line of metrics.jsonl; one that carries no time changes nothing."""
        if not isinstance(event, dict) or type(event.get("step")) is not int:
            return
        handler = _HANDLERS.get(str(event.get("event")))
        if handler is not None:
            handler(self, event)

    def accounted(self) -> float:
        """Return the seconds that are accounted for so far."""
        return sum(self.lost.values()) + sum(step.seconds for step in self.steps.values())

    def _on_start(self, event: dict[str, Any]) -> None:
        now = _seconds(event.get("time"))
        start_up = _seconds(event.get("start_up_seconds"))
        previous = _seconds(event.get("previous_end"))
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
        if step <= self.last_step:
            taken_back = [known for known in self.steps if known >= step]
            for known in taken_back:
                self.lost[self.reason] += self.steps.pop(known).seconds
        self.steps[step] = _Step(seconds=_seconds(event.get("seconds")))
        self.last_step = step

    def _on_data_wait(self, event: dict[str, Any]) -> None:
        if event["step"] in self.steps:
            self.steps[event["step"]].data_wait = _seconds(event.get("seconds"))

    def _on_save_wait(self, event: dict[str, Any]) -> None:
        if event["step"] in self.steps:
            self.steps[event["step"]].save_wait = _seconds(event.get("seconds"))

    def _on_skipped_update(self, event: dict[str, Any]) -> None:
        if event["step"] in self.steps:
            self.steps[event["step"]].skipped = True

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        blocked = _seconds(event.get("blocked_seconds", event.get("seconds")))
        # what an update waited is part of its step, and has an event of its own
        in_step = _seconds(event.get("update_wait_seconds"))
        self.lost["save_wait"] += max(0.0, blocked - in_step)

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self.lost["evaluation"] += _seconds(event.get("seconds"))

    def _on_rollback(self, event: dict[str, Any]) -> None:
        self.lost["rollback"] += _seconds(event.get("seconds"))
        self.reason = "rollback"

    def _on_end(self, event: dict[str, Any]) -> None:
        ended_at = _seconds(event.get("time"))
        if self.began_at is None and self.ended_at is not None:
            # a start that ended before its first step; the next one counts from here
            self.lost["restart"] += max(0.0, ended_at - self.ended_at)
        self._settle(ended_at)
        self.ended_at = ended_at

    def _settle(self, ended_at: float) -> None:
        """Put down to `other` what the present start has not accounted for."""
        if self.began_at is not None:
            elapsed = ended_at - self.began_at
            known = self.accounted() - self.known_before
            self.lost["other"] += max(0.0, elapsed - known)
        self.began_at = None

    def share_at(self, now: float) -> float:
        """Return the productive share of all time until now, for a start that goes on.

        Args:
            now: Unix time.
        """
        result = self.result()
        if self.began_at is None:
            return result.share
        total = max(result.total, self.known_before + now - self.began_at)
        return result.productive / total if total > 0 else math.nan

    def result(self) -> Goodput:
        """Return the account of all that was taken."""
        lost = dict(self.lost)
        productive = 0.0
        for step in self.steps.values():
            if step.skipped:
                lost["skipped"] += step.seconds
            else:
                lost["data_wait"] += step.data_wait
                lost["save_wait"] += step.save_wait
                productive += step.seconds - step.data_wait - step.save_wait
        return Goodput(productive=productive, lost=lost, num_starts=self.starts)


_HANDLERS: dict[str, Callable[[GoodputAccount, dict[str, Any]], None]] = {
    "start": GoodputAccount._on_start,
    "step": GoodputAccount._on_step,
    "data_wait": GoodputAccount._on_data_wait,
    "save_wait": GoodputAccount._on_save_wait,
    "skipped_update": GoodputAccount._on_skipped_update,
    "checkpoint": GoodputAccount._on_checkpoint,
    "evaluation": GoodputAccount._on_evaluation,
    "rollback": GoodputAccount._on_rollback,
    "end": GoodputAccount._on_end,
}
"""The method that takes each event; other events carry no time."""


def goodput(events: Iterable[Any]) -> Goodput:
    """Account for the time of a run.

    Args:
        events: All lines of metrics.jsonl in order, including those that a resume took back.
    """
    account = GoodputAccount()
    for event in events:
        account.take(event)
    return account.result()


def start_event(step: int, previous_end: float | None) -> dict[str, Any]:
    """Return the event of a start that is about to do its first step.

    Args:
        step: Steps done.
        previous_end: When the last line of metrics.jsonl was written; None for a run's first start.
    """
    event: dict[str, Any] = {
        "event": "start",
        "step": step,
        "time": time.time(),
        "start_up_seconds": age_seconds(),
    }
    if previous_end is not None:
        event["previous_end"] = previous_end
    return event


def _seconds(value: object) -> float:
    """Return a duration or time from a file; 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    try:
        return max(0.0, float(value)) if math.isfinite(value) else 0.0
    except OverflowError:  # a whole number of hundreds of digits
        return 0.0
