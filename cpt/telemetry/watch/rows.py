"""A run as one row of the index: texts that the templates show as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import quote

from cpt.telemetry.overview_text import MISSING, ago_text, decimals, percent, standing_text
from cpt.telemetry.report.panel import clean, duration
from cpt.telemetry.report.state_card import STATE_TONES, TONES, WORDS
from cpt.telemetry.report.tiles import amount
from cpt.telemetry.run_overview import RunOverview, utc
from cpt.telemetry.run_tally import GuardStanding
from cpt.telemetry.watch.board import ListedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardText:
    """The held-out domain that is nearest to its tolerance."""

    domain: str
    text: str
    """Loss, tolerance and state."""
    used: str
    """Share of the tolerance that is used up."""
    tone: str
    """Color of its state; empty if the log tells none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One run of the index."""

    key: str
    """Path below the folder of all runs."""
    link: str
    """The same as a part of an address."""
    folder: str
    """The folders above the run directory; empty if there are none."""
    name: str
    state: str
    tone: str
    cause: str
    problems: tuple[str, ...]
    step: str
    planned: str
    share_done: float
    """Share of the planned steps, 0 to 1."""
    eta: str
    speed: str
    utilization: str
    goodput: str
    loss: str
    guard: GuardText | None
    """None if nothing was measured."""
    action: str
    action_reason: str
    last_sign: str
    last_sign_at: str
    """The same as a time in UTC."""
    starts: str


def row_of(run: ListedRun, now: float) -> RunRow:
    """Return a run as a row.

    Args:
        run: The run.
        now: Unix time.
    """
    seen = run.overview
    planned = seen.planned_steps
    action = seen.actions[0] if seen.actions else None
    folder, _, name = run.key.rpartition("/")
    return RunRow(
        key=run.key,
        link=quote(run.key, safe="/"),
        folder=clean(folder, 80),
        name=clean(name, 60),
        state=WORDS.get(seen.state, seen.state),
        tone=TONES[seen.state],
        cause=clean(_cause(seen), 240),
        problems=tuple(clean(problem, 160) for problem in seen.problems),
        step=f"{seen.step:,}",
        planned=MISSING if planned is None else f"{planned:,}",
        share_done=min(1.0, seen.step / planned) if planned else 0.0,
        eta=duration(seen.eta_seconds) if math.isfinite(seen.eta_seconds) else MISSING,
        speed=amount(seen.tokens_per_second),
        utilization=percent(seen.utilization),
        goodput=percent(seen.goodput),
        loss=decimals(seen.loss, 3),
        guard=None if seen.worst is None else _guard_text(seen.worst),
        action=MISSING if action is None else f"step {action.step:,}: {clean(action.action)}",
        action_reason=_reason_beside(seen),
        last_sign=ago_text(now - seen.last_sign),
        last_sign_at=utc(seen.last_sign) if math.isfinite(seen.last_sign) else "",
        starts=f"{seen.num_starts:,}",
    )


def _cause(seen: RunOverview) -> str:
    """Return why the run is in its state, with the exit code of a failure."""
    if seen.state == "failed" and seen.exit_code is not None:
        return f"{seen.cause} (exit code {seen.exit_code})"
    return seen.cause


def _reason_beside(seen: RunOverview) -> str:
    """Return the reason of the guard's last action, unless it is the cause of the state."""
    if not seen.actions or seen.actions[0].reason == seen.cause:
        return ""
    return clean(seen.actions[0].reason, 200)


def _guard_text(worst: GuardStanding) -> GuardText:
    share = worst.used_share
    return GuardText(
        domain=clean(worst.title, 40),
        text=standing_text(worst),
        used=f"{100 * max(0.0, share):.0f} % of it used" if math.isfinite(share) else "",
        tone=STATE_TONES.get(worst.state, ""),
    )
