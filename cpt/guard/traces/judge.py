"""The pure half of the yardstick: divergences of traces -> bounds -> readings.

Text and control tokens of a domain are judged apart, and the worse of the two is its reading: a
model that keeps its words and loses the format would pass otherwise, since few tokens are format.

Decisions
    The traces are the same at every look, and one a prompt, so they are independent of each other.
    The chance of a wrong lower bound is divided over all looks and domains of the run.
    A trace counts with at most twice the hard limit. What is bounded is the mean of these values,
    which is never above that of the divergences: a few traces that are lost altogether cannot hide
    behind that cap, because each of them counts with many times the tolerance.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cpt.guard.score import Floats, as_floats
from cpt.guard.traces.bounds import lower_bound, upper_bound
from cpt.guard.yardstick import (
    BADNESS,
    FALSE_ALARM_SHARE,
    Json,
    Judgement,
    Look,
    Reading,
    State,
    state_of,
)
from data_pipeline.config.traces_config import TraceDomain

PARTS = ("text", "control")
"""Parts of a domain, each with a bound of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartReading:
    """The reading of the text or of the control tokens of a domain, in nats a token."""

    state: State
    """Green, amber or red."""
    divergence: float | None
    """Mean over the traces; None if it is not a number."""
    delta: float | None
    """The same of the values that count: none is above twice the hard limit."""
    lower_bound: float | None
    """The mean is not below it, at this look and all others together."""
    upper_bound: float | None
    """The mean is not above it, at this look."""

    @property
    def badness(self) -> tuple[int, float]:
        """What parts are compared by."""
        return BADNESS[self.state], np.inf if self.delta is None else self.delta


def value_cap(hard_limit: float) -> float:
    """Return the largest value that a trace counts with."""
    return 2 * hard_limit


def read_part(
    values: Floats, tolerance: float, hard_limit: float, *, false_alarm: float, error: float
) -> PartReading:
    """Return the reading of one part.

    Args:
        values: (traces,) divergences in nats a token.
        tolerance: Tolerated mean.
        hard_limit: Mean that ends in a pause if it stays.
        false_alarm: Chance that the lower bound is too high.
        error: Chance that the upper bound is too low.
    """
    if not np.isfinite(values).all():
        return PartReading(
            state="red", divergence=None, delta=None, lower_bound=None, upper_bound=None
        )
    cap = value_cap(hard_limit)
    counted = np.minimum(values, cap)
    lower = lower_bound(counted, false_alarm)
    upper = upper_bound(counted, cap, error)
    return PartReading(
        state=state_of(lower, upper, line=tolerance, tolerance=tolerance),
        divergence=float(values.mean()),
        delta=float(counted.mean()),
        lower_bound=lower,
        upper_bound=upper,
    )


class TraceJudge:
    """Judges divergences, which come with everything else that a reading depends on."""

    def judge(self, scores: Json, state: Json, look: Look) -> Judgement:
        """Judge the divergences of one look; see `cpt.guard.yardstick.Judge`.

        Args:
            scores: By domain, the output of `scores_of`.
            state: Unused.
            look: The look.
        """
        readings = []
        events = []
        for name, plain in scores.items():
            parts = _parts(plain, look)
            worse = max(parts, key=lambda part: parts[part].badness)
            found = parts[worse]
            readings.append(
                Reading(
                    domain=name,
                    kind="traces",
                    step=look.step,
                    state=found.state,
                    delta=found.delta,
                    lower_bound=found.lower_bound,
                    upper_bound=found.upper_bound,
                    tolerance=plain["tolerance"],
                    hard_limit=plain["hard_limit"],
                )
            )
            control = parts.get("control")
            events.append(
                {
                    "domain": name,
                    "language": plain["language"],
                    "traces": len(plain["text"]),
                    "divergence": parts["text"].divergence,
                    "control_divergence": None if control is None else control.divergence,
                    "decided_by": worse,
                    "delta": found.delta,
                    "lower_bound": found.lower_bound,
                    "upper_bound": found.upper_bound,
                    "tolerance": plain["tolerance"],
                    "hard_limit": plain["hard_limit"],
                }
            )
        return Judgement(readings=readings, state=state, events=events)

    def restarted(self, state: Json, domains: Collection[str]) -> Json:
        """Return the state unchanged: readings depend on the present divergences alone."""
        return state

    def returned(self, saved: Json, lost: Json) -> Json:
        """Return the saved state, which is empty."""
        return saved


def _parts(plain: Json, look: Look) -> dict[str, PartReading]:
    """Return the readings of the parts of a domain that have values."""
    num_bounds = len(PARTS) * max(1, look.num_tests)
    parts = {}
    for part in PARTS:
        values = as_floats(plain[part])
        if len(values):
            parts[part] = read_part(
                values,
                plain["tolerance"],
                plain["hard_limit"],
                false_alarm=FALSE_ALARM_SHARE / num_bounds,
                error=look.green_error,
            )
    return parts


def scores_of(domain: TraceDomain, text: Floats, control: Floats) -> Json:
    """Return divergences as JSON values, with all that a reading of them depends on.

    Args:
        domain: Keys of the domain.
        text: (traces,) divergences on text in nats a token.
        control: (traces,) divergences on control tokens.
    """
    return {
        "language": domain.language,
        "tolerance": domain.tolerance,
        "hard_limit": domain.hard_limit,
        "text": _plain(text),
        "control": _plain(control),
    }


def _plain(values: Floats) -> list[float | None]:
    """Return values for JSON, which knows no NaN."""
    return [value if np.isfinite(value) else None for value in values.tolist()]


def divergence_table(events: Sequence[Json]) -> str:
    """Return the divergences of all domains as a table for people.

    Args:
        events: `guard` lines of traces.
    """
    width = max([15, *(len(event["domain"]) for event in events)])
    lines = [
        "divergence on own traces, nats a token",
        f"  {'domain':<{width}}     text  control  (at least, at most)  tolerance",
    ]
    for event in events:
        line = (
            f"  {event['domain']:<{width}}  {_number(event['divergence'])}  "
            f"{_number(event['control_divergence'])}  ({_number(event['lower_bound'])}, "
            f"{_number(event['upper_bound'])})  {event['tolerance']:9g}  {event['state']}"
        )
        if event.get("action", "none") != "none":
            line += "  WARNING"
        lines.append(line)
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.4f}"
