"""The first card of the page: what state a run is in, how far it is, and why it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpt.telemetry.report.panel import Panel, Table, TableRow, clean, duration
from cpt.telemetry.run_overview import RunOverview, RunState
from cpt.telemetry.run_tally import GuardStanding

TONES: dict[RunState, str] = {
    "running": "busy",
    "stopped": "warning",
    "paused": "warning",
    "failed": "alarm",
    "finished": "good",
    "never started": "muted",
    "unknown": "muted",
}
"""Color of each state, one of `theme.TEXTS`."""
WORDS: dict[RunState, str] = {"paused": "paused by the guard"}
"""Words for states that do not speak for themselves."""
STATE_TONES = {"green": "good", "amber": "warning", "red": "alarm"}
"""Color of each state of the guard."""
MAX_STANDINGS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class StateCard:
    """The state of a run, for people."""

    word: str
    tone: str
    """Color, one of `theme.TEXTS`."""
    cause: str
    """Why it is in this state; empty where the state says it all."""
    progress: float | None
    """Share of the planned steps that is done, 0 to 1; None if the plan is not known."""
    progress_text: str
    problems: tuple[str, ...]
    """What a person should look at."""


def state_card(overview: RunOverview) -> StateCard:
    """Return the first card of the page."""
    cause = clean(overview.cause, 300)
    if overview.state == "failed" and overview.exit_code is not None:
        cause += f" (exit code {overview.exit_code})"
    planned = overview.planned_steps
    return StateCard(
        word=WORDS.get(overview.state, overview.state),
        tone=TONES[overview.state],
        cause=cause,
        progress=min(1.0, overview.step / planned) if planned else None,
        progress_text=_progress_text(overview),
        problems=tuple(clean(problem, 200) for problem in overview.problems),
    )


def _progress_text(overview: RunOverview) -> str:
    """Return how far the run is: step, saved step, and the time to its end."""
    planned = overview.planned_steps
    parts = [f"step {overview.step:,}"]
    if planned:
        parts = [f"step {overview.step:,} of {planned:,} ({100 * overview.step / planned:.0f} %)"]
    if overview.saved_step is not None:
        parts.append(f"saved: step {overview.saved_step:,}")
    if math.isfinite(overview.eta_seconds):
        parts.append(f"{duration(overview.eta_seconds)} to go")
    return ", ".join(parts)


def standing_panel(overview: RunOverview) -> Panel | None:
    """Show where every held-out domain stands against its tolerance; None if nothing was measured.

    Those that lost the most come first.
    """
    if not overview.guard:
        return None
    rows = []
    for standing in overview.guard[:MAX_STANDINGS]:
        texts = (
            _measured(standing),
            _amount(standing.delta, standing.unit),
            _amount(standing.tolerance, standing.unit),
            _used(standing),
            clean(standing.state, 20),
            f"{standing.step:,}",
        )
        tone = STATE_TONES.get(standing.state, "")
        rows.append(TableRow(texts=texts, tones={4: tone} if tone else {}))
    hidden = len(overview.guard) - len(rows)
    return Panel(
        title="The guard now",
        width=7 if overview.actions else 12,
        detail=f"{hidden:,} more are further from their tolerance" if hidden else "",
        table=Table(
            headings=("domain", "change", "tolerance", "used", "state", "step"),
            rows=tuple(rows),
        ),
    )


def actions_panel(overview: RunOverview) -> Panel | None:
    """List what the guard did last, newest first; None if it did nothing."""
    if not overview.actions:
        return None
    rows = []
    for action in overview.actions:
        texts = (f"{action.step:,}", clean(action.action, 40), clean(action.reason, 160))
        rows.append(TableRow(texts=texts))
    return Panel(
        title="Last actions of the guard",
        width=5,
        table=Table(headings=("at step", "action", "reason"), rows=tuple(rows)),
    )


def _measured(standing: GuardStanding) -> str:
    """Return the domain, and how it was measured if not by held-out text."""
    domain = clean(standing.domain, 60)
    return domain if standing.kind == "text" else f"{domain} ({clean(standing.kind, 20)})"


def _amount(value: float, unit: str) -> str:
    """Return a loss or a tolerance with its unit; a dash if it is not known."""
    if not math.isfinite(value):
        return "-"
    if unit == "nats a token":
        return f"{value:+.3g} nats"
    return f"{value:+.2f} {unit}"


def _used(standing: GuardStanding) -> str:
    """Return the share of the tolerance that is used up, in percent; a gain uses nothing."""
    share = standing.used_share
    return f"{100 * max(0.0, share):.0f} %" if math.isfinite(share) else "-"
