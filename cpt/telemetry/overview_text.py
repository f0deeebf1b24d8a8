"""The figures of a run's overview as texts, for terminals and for pages."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from cpt.telemetry.report.panel import duration, plural
from cpt.telemetry.report.tiles import amount
from cpt.telemetry.run_overview import RunOverview, utc
from cpt.telemetry.run_tally import GuardStanding
from data_pipeline.escaping import escaped_line

MISSING = "-"
"""Stands where a run has logged no such number."""


def describe_overview(seen: RunOverview, now: float) -> str:
    """Return the state of a run as lines for a terminal.

    Args:
        seen: The state.
        now: Unix time.
    """
    rows = list(_rows(seen, now))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {escaped_line(text)}" for name, text in rows)


def _rows(seen: RunOverview, now: float) -> Iterator[tuple[str, str]]:
    yield "state", state_text(seen)
    yield "step", f"{step_text(seen)}, saved {saved_text(seen)}"
    if math.isfinite(seen.eta_seconds):
        yield "ends in", duration(seen.eta_seconds)
    if seen.step:
        yield "loss", f"{decimals(seen.loss, 3)} nats per predicted token"
        yield "speed", speed_text(seen)
    if math.isfinite(seen.goodput):
        yield (
            "goodput",
            f"{percent(seen.goodput)} of the time of {plural(seen.num_starts, 'start')}",
        )
    for standing in seen.guard:
        yield "guard", f"{standing.title}: {standing_text(standing)} (step {standing.step:,})"
    for action in seen.actions:
        yield "action", f"step {action.step:,}: {action.action}. {action.reason}".rstrip(". ")
    if math.isfinite(seen.last_sign):
        ago = duration(round(max(0.0, now - seen.last_sign)))
        yield "last sign", f"{utc(seen.last_sign)}, {ago} ago"
    if seen.host:
        yield "lock", seen.host
    for problem in seen.problems:
        yield "note", problem


def state_text(seen: RunOverview) -> str:
    """Return the state with its cause and exit code."""
    text = f"{seen.state}: {seen.cause}" if seen.cause else seen.state
    return text if not seen.exit_code else f"{text} (exit code {seen.exit_code})"


def step_text(seen: RunOverview) -> str:
    """Return the steps done and planned."""
    planned = "?" if seen.planned_steps is None else f"{seen.planned_steps:,}"
    return f"{seen.step:,} of {planned}"


def saved_text(seen: RunOverview) -> str:
    """Return the newest checkpoint."""
    return "nothing" if seen.saved_step is None else f"step {seen.saved_step:,}"


def speed_text(seen: RunOverview) -> str:
    """Return tokens a second, seconds a step, and the share of the peak where it is known."""
    text = f"{amount(seen.tokens_per_second)} tokens/s, {duration(seen.seconds_per_step)} per step"
    if math.isfinite(seen.utilization):
        text += f", {percent(seen.utilization)} of the peak"
    return text


def standing_text(standing: GuardStanding) -> str:
    """Return the loss of a domain against its tolerance, and its state."""
    text = f"{signed(standing.delta)} {standing.unit}"
    if math.isfinite(standing.tolerance):
        text += f", tolerated {signed(standing.tolerance)}"
    return f"{text}, {standing.state}" if standing.state else text


def signed(value: float) -> str:
    """Return a change in three digits with its sign."""
    return f"{value:+.3g}" if math.isfinite(value) else "?"


def decimals(value: float, places: int) -> str:
    """Return a number with fixed decimals."""
    return f"{value:.{places}f}" if math.isfinite(value) else MISSING


def percent(share: float) -> str:
    """Return a share of 0 to 1 in percent."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else MISSING


def ago_text(seconds: float) -> str:
    """Return how long ago something was, in its largest unit; MISSING if it is not known."""
    if not math.isfinite(seconds):
        return MISSING
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def date_text(seconds: float) -> str:
    """Return a Unix time for people, by the clock of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
