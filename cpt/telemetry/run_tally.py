"""What the events of a run add up to so far; each event is taken once, in the order of the file."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Any

from cpt.telemetry.goodput import Goodput, GoodputAccount

RECENT_STEPS = 50
"""Steps over which speed and time per step are averaged."""
KEPT_ACTIONS = 8
"""Newest actions of the guard that are kept."""
UNITS = {"text": "%", "generation": "points", "traces": "nats a token"}
"""Unit of losses and tolerances by kind of yardstick."""
JUDGED_MEASURES = (None, "format", "accuracy")
"""Measures whose lines carry a loss and a tolerance; lines of text and traces have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardStanding:
    """The newest measurement of one held-out domain against its tolerance."""

    domain: str
    kind: str
    """Kind of the yardstick: text, generation or traces."""
    state: str
    """green, amber or red; empty in logs that do not tell."""
    step: int
    """Optimizer steps done when it was measured."""
    delta: float
    """Estimate of the loss in `unit`; negative is a gain, NaN is not a number."""
    tolerance: float
    """Largest loss that is tolerated, in `unit`; NaN if it is not known."""
    unit: str
    measure: str = ""
    """Measure of replies, such as format; empty for text and traces."""

    @property
    def title(self) -> str:
        """The domain, with the measure of replies."""
        return f"{self.domain} {self.measure}".rstrip()

    @property
    def used_share(self) -> float:
        """Share of the tolerance that is used up; NaN if it cannot be told."""
        if math.isnan(self.tolerance) or self.tolerance <= 0:
            return math.nan
        return self.delta / self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardAction:
    """Something that the guard did."""

    step: int
    action: str
    reason: str
    """In words; empty if the log has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """How a start of the run ended, as far as it could still write it."""

    time: float
    """Unix time; NaN if it is not known."""
    exit_code: int | None
    """None in logs that do not tell."""
    cause: str
    """One line for people; empty if there is none."""


class RunTally:
    """A run's present figures."""

    def __init__(self) -> None:
        self.num_events = 0
        self.step = 0
        """Optimizer steps done."""
        self.loss = math.nan
        """Nats per predicted token of the last step."""
        self.learning_rate = math.nan
        self.utilization = math.nan
        """Share of the peak arithmetic, 0 to 1, if the log has it."""
        self.started = math.nan
        """Unix time at which the last start began to train."""
        self.peak_memory_bytes: int | None = None
        """Most memory that the first rank has used, if the log has it."""
        self.num_starts = 0
        """Starts that reached their first step."""
        self.num_going_back = 0
        """How often steps were logged again after a restart or a rollback."""
        self.end: RunEnd | None = None
        """How the last start ended; None while it goes on, or if it could not say."""
        self.pause_reason = ""
        """Why the guard paused the run; empty if it has not, or the run has gone on since."""
        self.last_checkpoint: int | None = None
        self.failed_save = ""
        """Why the newest save failed; empty once a later one succeeded."""
        self.actions: deque[GuardAction] = deque(maxlen=KEPT_ACTIONS)
        self._standings: dict[tuple[str, str, str], GuardStanding] = {}
        self._has_decisions = False
        self._tolerances: dict[str, float] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)
        self._total_tokens: int | None = None
        self._steps = array("q")
        self._tokens = array("q")
        self._account = GoodputAccount()
        self._goodput: Goodput | None = None
        self._accounted_events = 0
        self._logged_goodput = math.nan

    def take(self, event: dict[str, Any]) -> None:
        """Take the next event of metrics.jsonl."""
        self.num_events += 1
        self._account.take(event)
        kind = event.get("event")
        if kind == "step":
            self._take_step(event)
        elif kind == "start":
            self.num_starts += 1
            self.started = number(event.get("time"))
            self.end = None
            self._recent.clear()
        elif kind == "end":
            self._take_end(event)
        elif kind == "goodput":
            self._logged_goodput = number(event.get("goodput"))
        elif kind == "checkpoint":
            self.last_checkpoint = whole_number(event.get("step"))
            self.failed_save = ""
        elif kind == "checkpoint_failed":
            self.failed_save = str(event.get("reason"))
        elif kind == "guard":
            self._take_measurement(event)
        elif kind == "guard_decision":
            self._take_decision(event)
        elif kind in ("guard_rollback", "rollback"):
            self._take_rollback(event)

    def logged_tokens(self) -> int | None:
        """Return the tokens that the run itself has counted; None in logs that do not tell."""
        return self._total_tokens

    def tokens(self) -> int:
        """Return the predicted tokens of all steps that count."""
        return sum(self._tokens) if self._total_tokens is None else self._total_tokens

    def seconds_per_step(self) -> float:
        """Return the mean duration of the last steps; NaN if there are none."""
        if not self._recent:
            return math.nan
        return sum(seconds for _, seconds in self._recent) / len(self._recent)

    def tokens_per_second(self) -> float:
        """Return the slots with a token per second over the last steps; NaN if there are none."""
        seconds = sum(seconds for _, seconds in self._recent)
        if seconds <= 0:
            return math.nan
        return sum(slots for slots, _ in self._recent) / seconds

    def goodput(self) -> float:
        """Return the productive share of the time of all starts so far; NaN if none was logged."""
        # the account takes as long as the run has steps: it is made again when 0.1 % were added
        added = self.num_events - self._accounted_events
        if self._goodput is None or added > 0.001 * self.num_events:
            self._goodput = self._account.result()
            self._accounted_events = self.num_events
        return self._goodput.share

    def logged_goodput(self) -> float:
        """Return the share that the run itself logged last; NaN if it has not."""
        return self._logged_goodput

    def standings(self) -> list[GuardStanding]:
        """Return the newest measurement of each domain."""
        return list(self._standings.values())

    def _take_step(self, event: dict[str, Any]) -> None:
        step = whole_number(event.get("step"))
        if step is None:
            return
        if step <= self.step and self._steps:
            self.num_going_back += 1
            self._go_back_before(step)
        self.step = step
        self.end = None
        self.pause_reason = ""
        self.loss = number(event.get("loss"))
        self.learning_rate = number(event.get("lr"))
        self.utilization = number(event.get("utilization"))
        self.peak_memory_bytes = whole_number(event.get("peak_memory_bytes"))
        tokens = whole_number(event.get("tokens")) or 0
        self._total_tokens = whole_number(event.get("total_tokens"))
        self._steps.append(step)
        self._tokens.append(tokens)
        seconds = number(event.get("seconds"))
        if math.isfinite(seconds):
            slots = whole_number(event.get("slots"))  # absent in logs of earlier versions
            self._recent.append((tokens if slots is None else slots, seconds))

    def _go_back_before(self, step: int) -> None:
        """Forget what a restart or a rollback took back."""
        kept = bisect_left(self._steps, step)
        del self._steps[kept:]
        del self._tokens[kept:]
        for key, standing in list(self._standings.items()):
            if standing.step >= step:
                del self._standings[key]

    def _take_end(self, event: dict[str, Any]) -> None:
        self._goodput = None
        known = self.end or RunEnd(time=math.nan, exit_code=None, cause="")
        time = number(event.get("time"))
        code = whole_number(event.get("exit_code"))
        self.end = RunEnd(
            time=time if math.isfinite(time) else known.time,
            exit_code=known.exit_code if code is None else code,
            cause=str(event.get("cause") or known.cause),
        )

    def _take_measurement(self, event: dict[str, Any]) -> None:
        step = whole_number(event.get("step"))
        if step is None or event.get("measure") not in JUDGED_MEASURES:
            return
        kind = str(event.get("kind", "text"))
        domain = str(event.get("domain"))
        tolerance = number(event.get("tolerance"))
        if math.isnan(tolerance):
            tolerance = self._tolerances.get(domain, math.nan)
        measure = str(event.get("measure") or "")
        delta = number(event.get("delta", event.get("delta_percent")))
        action = str(event.get("action", "none"))
        if action != "none" and not self._has_decisions:
            change = f"{domain}: {delta:+.2f} {UNITS.get(kind, '')}"
            self.actions.append(GuardAction(step=step, action=action, reason=change))
        self._standings[kind, domain, measure] = GuardStanding(
            domain=domain,
            measure=measure,
            kind=kind,
            state=str(event.get("state") or ""),
            step=step,
            delta=delta,
            tolerance=tolerance,
            unit=UNITS.get(kind, ""),
        )

    def _take_decision(self, event: dict[str, Any]) -> None:
        step = whole_number(event.get("step")) or 0
        self._has_decisions = True
        action = str(event.get("action", "none"))
        reason = str(event.get("reason") or "")
        if action != "none":
            self.actions.append(GuardAction(step=step, action=action, reason=reason))
        if action == "pause":
            self.pause_reason = reason or "the guard found a loss"
        evidence = event.get("evidence")
        for reading in evidence if isinstance(evidence, list) else []:
            if isinstance(reading, dict):
                tolerance = number(reading.get("tolerance"))
                self._tolerances[str(reading.get("domain"))] = tolerance

    def _take_rollback(self, event: dict[str, Any]) -> None:
        step = whole_number(event.get("step")) or 0
        start = whole_number(event.get("from_step"))
        reason = str(event.get("reason") or "the loss was not finite in three steps in a row")
        if start is not None:
            reason = f"from step {start:,}: {reason}"
        self.pause_reason = ""
        self.actions.append(GuardAction(step=step, action="rollback", reason=reason))


def badness(standing: GuardStanding) -> tuple[bool, float, float]:
    """Return what standings are sorted by: a loss that is not a number is the worst."""
    if math.isnan(standing.delta):
        return True, 0.0, 0.0
    share = standing.used_share
    return False, -math.inf if math.isnan(share) else share, standing.delta


def number(value: object) -> float:
    """Return a number from a file as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def whole_number(value: object) -> int | None:
    """Return a whole number from a file that is not negative; None for anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else None
