"""The log of a run, read back: the branch of steps that counts, as columns over steps.

A run that resumes from an older checkpoint appends to metrics.jsonl.  When step k is logged again,
everything that was logged before for step k or later was taken back by the resume and is dropped:
steps, measurements and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.telemetry.event_reader import SHOWN_BYTES, read_last_events
from cpt.telemetry.goodput import Goodput, goodput
from cpt.telemetry.report.series import Array
from cpt.telemetry.report.starts import Mark, Start, marks, starts
from cpt.telemetry.run_overview import CONFIG, METRICS, read_small_yaml
from cpt.telemetry.run_tally import number
from data_pipeline.bounded.files import MalformedInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The log of a run, without what a resume took back."""

    steps: Array
    """Optimizer steps, ascending."""
    step_events: list[dict[str, Any]]
    """The event of each of `steps`."""
    guard_events: list[dict[str, Any]]
    """The last measurement of each step and domain of held-out text, in order of steps."""
    generation_events: list[dict[str, Any]]
    """The last measurement of replies of each step, domain and measure, in order of steps."""
    trace_events: list[dict[str, Any]]
    """The last measurement of each step and domain of own traces, in order of steps."""
    checkpoint_events: list[dict[str, Any]]
    router_events: list[dict[str, Any]]
    """The last measurement of each step, in order of steps."""
    marks: list[Mark]
    """Steps from which the run went on after a new start or a rollback, ascending."""
    starts: list[Start]
    num_repeated_steps: int
    config: dict[str, Any]
    """Content of config.resolved.yaml; empty if it cannot be read."""
    goodput: Goodput
    """Use of the time, over all starts."""
    run_dir: Path
    """The run directory, for files that events name."""
    notes: list[str]
    """Warnings for the reader of the page."""

    def column(self, key: str) -> Array:
        """Return one number of every step; NaN where it is missing."""
        return np.asarray([number(event.get(key)) for event in self.step_events], dtype=np.float64)

    def columns(self, key: str) -> dict[str, Array]:
        """Return a map that every step logs as one column per entry."""
        found: dict[str, Array] = {}
        for row, event in enumerate(self.step_events):
            values = event.get(key)
            if not isinstance(values, dict):
                continue
            for name, value in values.items():
                if name not in found:
                    found[name] = np.full(len(self.step_events), math.nan)
                found[name][row] = number(value)
        return found

    def setting(self, section: str, key: str) -> Any:
        """Return one value of the configuration, or None."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None


def read_run(run_dir: Path) -> Run:
    """Read metrics.jsonl and config.resolved.yaml."""
    events, is_whole = read_last_events(run_dir / METRICS, SHOWN_BYTES)
    kept, repeated = current_branch(events)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in kept:
        by_kind.setdefault(str(event["event"]), []).append(event)
    steps = by_kind.get("step", [])
    guard = by_kind.get("guard", [])
    router = {event["step"]: event for event in by_kind.get("router", [])}
    config, notes = _read_config(run_dir / CONFIG)
    if not is_whole:
        notes.append(f"Only the last {SHOWN_BYTES // 2**20} MiB of {METRICS} are shown.")
    lost = [event["step"] for event in steps if not math.isfinite(number(event.get("loss")))]
    if lost:
        notes.append(
            f"The loss is not a finite number at {len(lost):,} of {len(steps):,} steps, "
            f"first at step {lost[0]:,}."
        )
    return Run(
        steps=np.asarray([event["step"] for event in steps], dtype=np.float64),
        step_events=steps,
        guard_events=last_measurements(guard, "text"),
        generation_events=last_measurements(guard, "generation"),
        trace_events=last_measurements(guard, "traces"),
        checkpoint_events=by_kind.get("checkpoint", []),
        router_events=list(router.values()),
        marks=marks(events),
        starts=starts(events),
        num_repeated_steps=repeated,
        config=config,
        goodput=goodput(events),
        run_dir=run_dir,
        notes=notes,
    )


def last_measurements(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the last of the guard's lines of each step, domain and measure, in order of steps.

    Args:
        events: Lines of all kinds.
        kind: Kind of the yardstick that is wanted.
    """
    found = {}
    for event in events:
        if event.get("kind", "text") == kind:
            found[event["step"], str(event.get("domain")), str(event.get("measure"))] = event
    return sorted(found.values(), key=lambda event: event["step"])


def current_branch(events: Iterable[Any]) -> tuple[list[dict[str, Any]], int]:
    """Drop what a resume took back: when step k is logged again, everything logged before for k or
    later.

    Returns:
        The events that count, and how many steps were trained more than once.
    """
    kept: list[dict[str, Any]] = []
    last = -1
    repeated = 0
    for event in events:
        if not isinstance(event, dict) or not _is_step(event.get("step")) or "event" not in event:
            continue
        if event["event"] == "step":
            step = event["step"]
            if step <= last:
                taken_back = [e for e in kept if e["step"] >= step]
                repeated += sum(e["event"] == "step" for e in taken_back)
                kept = [e for e in kept if e["step"] < step]
            last = step
        kept.append(event)
    return kept, repeated


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of the file, and a note where it cannot be read."""
    try:
        return read_small_yaml(path), []
    except (OSError, MalformedInput):
        return {}, [
            f"{path.name} is missing or damaged: tolerance, clipping and planned steps are not "
            "shown."
        ]
