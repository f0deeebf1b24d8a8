"""The headline numbers of the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import action_of, change_text, clean
from cpt.telemetry.report.series import Array
from cpt.telemetry.run_overview import RunOverview
from cpt.telemetry.run_tally import number


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One headline number."""

    name: str
    value: str
    detail: str
    alarm: bool = False
    """Whether a person should look into it."""


def tiles(run: Run, overview: RunOverview) -> list[Tile]:
    """Return the headline numbers that the log of a run allows."""
    found = [_tokens_tile(run), *_training_tiles(run), *_machine_tiles(run, overview)]
    worst = max(_latest_by_domain(run), key=_change_of, default=None)
    if worst is not None:
        detail = f"{clean(worst.get('domain'), 60)}, step {worst['step']:,}"
        alarm = action_of(worst) != "none"
        value = change_text(worst)
        found.append(Tile(name="Worst held-out domain", value=value, detail=detail, alarm=alarm))
    found.append(_checkpoints_tile(run))
    if run.num_repeated_steps:
        value = f"{run.num_repeated_steps:,}"
        found.append(Tile(name="Repeated steps", value=value, detail="again after resumes"))
    return found


def _tokens_tile(run: Run) -> Tile:
    tokens = run.column("tokens")
    detail = f"{amount(_median(tokens))} per step, predicted"
    slots = np.nansum(run.column("slots"))
    if slots > np.nansum(tokens):  # loss masks
        detail += f"; {amount(float(slots))} were read"
    return Tile(name="Tokens", value=amount(float(np.nansum(tokens))), detail=detail)


def _training_tiles(run: Run) -> list[Tile]:
    losses = run.column("loss")
    if not len(losses):
        return []
    rate = amount(_median(run.column("tokens_per_second")))
    seconds = f"{_median(run.column('seconds')):.3g} s per step"
    loss = f"from {losses[0]:.3f}, nats per token"
    return [
        Tile(name="Last loss", value=f"{losses[-1]:.3f}", detail=loss),
        Tile(name="Tokens/s, median", value=rate, detail=seconds),
    ]


def _machine_tiles(run: Run, overview: RunOverview) -> list[Tile]:
    """Return how well the machine is used, as far as the log tells."""
    found = []
    utilization = 100 * _median(run.column("utilization"))
    if math.isfinite(utilization):
        detail = "of the dense bf16 peak"
        found.append(Tile(name="Utilization", value=f"{utilization:.1f} %", detail=detail))
    memory = run.column("peak_memory_bytes") / 2**30
    if np.any(memory > 0):
        value = f"{np.nanmax(memory):.3g} GiB"
        found.append(Tile(name="Peak memory", value=value, detail="rank 0"))
    if math.isfinite(overview.goodput):
        detail = "of the time went into steps that count"
        value = f"{100 * overview.goodput:.1f} %"
        found.append(Tile(name="Goodput", value=value, detail=detail))
    return found


def _checkpoints_tile(run: Run) -> Tile:
    events = run.checkpoint_events
    if not events:
        return Tile(name="Checkpoints", value="0", detail="none saved")
    seconds = _median(np.asarray([number(event.get("seconds")) for event in events]))
    detail = f"step {events[-1]['step']:,}; {seconds:.3g} s each"
    return Tile(name="Checkpoints", value=f"{len(events):,}", detail=detail)


def _latest_by_domain(run: Run) -> list[dict[str, Any]]:
    """Return the newest measurement of every held-out domain, if it has a number."""
    latest = {str(event.get("domain")): event for event in run.guard_events}
    return [event for event in latest.values() if math.isfinite(_change_of(event))]


def _change_of(event: dict[str, Any]) -> float:
    return number(event.get("delta_percent"))


def amount(value: float) -> str:
    """Return a number in three digits: 950, 12.3 k, 4.56 M."""
    if not math.isfinite(value):
        return "-"
    power = min(5, max(0, math.floor(math.log10(max(abs(value), 1.0)) / 3 + 1e-9)))
    if power == 0:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value / 1000.0**power:.3g} {' kMBTP'[power]}"


def _median(values: Array) -> float:
    """Return the median of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
