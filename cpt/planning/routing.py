"""How unevenly a run uses its experts, from the router watch in its metrics.jsonl."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError
from cpt.telemetry.event_reader import iter_events

LAST_EVENTS = 20
"""Measurements at the end of a run that are averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The load of the busiest expert of every layer."""

    run: str
    """Name of the run directory."""
    steps: tuple[int, int]
    """The first and the last step that were averaged."""
    busiest: tuple[float, ...]
    """By layer: tokens of the busiest expert over the mean of all experts."""

    def rank_imbalance(self, experts_per_rank: int, num_experts: int) -> float:
        """Return the rows of the busiest rank over the mean, averaged over layers.

        The watch knows the busiest expert alone. The others of its rank are taken to have the mean
        load of all others, so with several experts on a rank this is a low estimate.
        """
        total = 0.0
        for busiest in self.busiest:
            others = (num_experts - busiest) / (num_experts - 1)
            rows = busiest + (experts_per_rank - 1) * others
            total += max(1.0, rows / experts_per_rank)
        return total / len(self.busiest)

    def describe(self) -> str:
        """Return what was read, for people."""
        first, last = self.steps
        mean = sum(self.busiest) / len(self.busiest)
        return (
            f"as in {self.run}, steps {first} to {last}: the busiest expert of a layer has "
            f"{mean:.2f} x the mean (worst layer {max(self.busiest):.2f} x); other experts of its "
            "rank are taken to be average"
        )


def read_routing(run_dir: Path) -> Routing:
    """Read how a run used its experts in its last measurements.

    Raises:
        ConfigError: the directory holds no metrics.jsonl, or no router was measured.
    """
    try:
        measured = _measured(run_dir / "metrics.jsonl")
    except OSError as error:
        raise ConfigError(
            f"--routing_of {run_dir}: {error.strerror}: {error.filename}. Is it a run directory?"
        ) from error
    if not measured:
        raise ConfigError(
            f"--routing_of {run_dir}: metrics.jsonl has no router event. Set "
            "telemetry.router_interval_steps in the run, or give --imbalance."
        )
    layers = zip(*(event["load_max_over_mean"] for event in measured), strict=True)
    busiest = []
    for loads in layers:
        busiest.append(sum(loads) / len(loads))
    return Routing(
        run=run_dir.name, steps=(measured[0]["step"], measured[-1]["step"]), busiest=tuple(busiest)
    )


def _measured(metrics: Path) -> list[dict[str, Any]]:
    """Return the last `LAST_EVENTS` measurements of the router that are whole."""
    last: deque[dict[str, Any]] = deque(maxlen=LAST_EVENTS)
    for event in iter_events(metrics, ("router",)):
        if None not in event["load_max_over_mean"]:
            last.append(event)
    return list(last)
