"""What trackers show of the events of a run: numbers, distributions over layers, and tables.

Names are such as `train/loss`, `loss_by_language/ja`, `guard/english/bits_per_byte`,
`guard/maths_ja/accuracy/rate`, `router/entropy`, `router/ja/overlap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.escaping import escaped_line, escaped_text

Event = dict[str, Any]

GUARD_COLUMNS = (
    "domain",
    "measure",
    "baseline",
    "now",
    "change",
    "lower bound",
    "upper bound",
    "tolerance",
    "state",
    "action",
)
"""Columns of the table of a measurement of the guard."""
SAMPLE_COLUMNS = ("number", "prompt", "continuation")
"""Columns of the table of the continuations of one step."""
_NOW = ("bits_per_byte", "rate", "divergence")
"""Fields with the measured value, one of which a line of the guard has."""
_CHANGE = ("delta_percent", "delta")


def scalars(event: Event) -> dict[str, float]:
    """Flatten one event into named numbers."""
    kind = event["event"]
    if kind == "guard_decision":
        # its settings and states are for `cpt guard audit`
        after = event["after"]
        numbers = {"guard/lr_scale": after["lr_scale"]}
        for name, share in {**after["shares"], **after.get("replay", {})}.items():
            numbers[f"guard/replay_share/{name}"] = share
        return numbers
    if kind == "memory":
        return memory_numbers(event)
    prefixes = {"step": "train", "guard": f"guard/{event.get('domain')}"}
    prefix = prefixes.get(kind, str(kind))
    if "measure" in event:
        prefix += f"/{event['measure']}"
    numbers = {}
    for key, value in event.items():
        if isinstance(value, dict):
            for name, item in value.items():
                if is_number(item):
                    numbers[f"{key}/{name}"] = item
        elif is_number(value) and key not in ("step", "total_tokens"):
            numbers[f"{prefix}/{key}"] = value
    return numbers


def memory_numbers(event: Event) -> dict[str, float]:
    """Return predicted bytes, and those of the rank that has most, by part."""
    numbers: dict[str, float] = {}
    for part, expected in event["predicted"].items():
        numbers[f"memory/predicted/{part}"] = expected
    for rank in event["measured_by_rank"]:
        for part, measured in rank.items():
            name = f"memory/largest_rank/{part}"
            numbers[name] = max(measured, numbers.get(name, 0))
    return numbers


def distributions(event: Event) -> dict[str, list[float]]:
    """Return the values of all layers by name: how the routers of one step differ."""
    if event["event"] != "router":
        return {}
    groups = {"router": event}
    for language, found in event.get("by_language", {}).items():
        groups[f"router/{language}"] = found
    result = {}
    for prefix, group in groups.items():
        for key, value in group.items():
            if not isinstance(value, list):
                continue
            values = [float(item) for item in value if is_number(item) and math.isfinite(item)]
            if values:
                result[f"{prefix}/{key}"] = values
    return result


def is_number(value: object) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(kw_only=True)
class StepTable:
    """A table that belongs to one step."""

    name: str
    step: int
    columns: Sequence[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [" | ".join(self.columns), " | ".join("---" for _ in self.columns)]
        for row in self.rows:
            lines.append(" | ".join(_cell(value) for value in row))
        return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escaped_line(" ".join(str(value).replace("|", "\\|").split()))


@dataclass(kw_only=True)
class StepTables:
    """Gathers the lines of a measurement, and the continuations of a step, to tables.

    The lines of a measurement end with `evaluation`, and continuations with the next other event.
    """

    _tolerances: dict[str, Any] = field(default_factory=dict)
    _guard: list[list[Any]] = field(default_factory=list)
    _samples: list[list[Any]] = field(default_factory=list)
    _sample_step: int = 0

    def take(self, event: Event) -> list[StepTable]:
        """Take one event and return the tables that it completes."""
        kind = event["event"]
        if kind == "sample":
            self._sample_step = event["step"]
            texts = [escaped_text(str(event[key])) for key in ("prompt", "text")]
            self._samples.append([event["number"], *texts])
            return []
        tables = self.rest()
        if kind == "guard_decision":
            for evidence in event.get("evidence", []):
                self._tolerances[evidence["domain"]] = evidence.get("tolerance")
        elif kind == "guard":
            self._guard.append(self._guard_row(event))
        elif kind == "evaluation" and self._guard:
            rows = self._guard
            self._guard = []
            tables.append(
                StepTable(name="guard/table", step=event["step"], columns=GUARD_COLUMNS, rows=rows)
            )
        return tables

    def rest(self) -> list[StepTable]:
        """Return the continuations that no other event has followed."""
        if not self._samples:
            return []
        rows = self._samples
        self._samples = []
        return [
            StepTable(name="samples", step=self._sample_step, columns=SAMPLE_COLUMNS, rows=rows)
        ]

    def _guard_row(self, event: Event) -> list[Any]:
        domain = event.get("domain")
        return [
            domain,
            event.get("measure", "text" if event.get("kind") in (None, "text") else event["kind"]),
            event.get("baseline"),
            _first(event, _NOW),
            _first(event, _CHANGE),
            event.get("lower_bound"),
            event.get("upper_bound"),
            event.get("tolerance", self._tolerances.get(domain or "")),
            event.get("state"),
            event.get("action"),
        ]


def _first(event: Event, names: Sequence[str]) -> Any:
    """Return the first of several fields that an event has."""
    for name in names:
        if name in event:
            return event[name]
    return None
