"""What steers, or does not steer, the simulated runs, and the figures of each contender."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.guard_plants_parts.plants import (
    GAINS,
    PLANTS,
    TOLERANCE,
    Evidences,
    Outcome,
    Plant,
    best_fixed_share,
    simulate,
)
from cpt.config import GuardSection

TWO_WAY = GuardSection(interval_steps=200)
FREE = GuardSection(interval_steps=200, least_replay=0.04)
LADDER = GuardSection(interval_steps=200, controller="ladder")
FIXED = GuardSection(policy="warn")
SETTLED_LOOK = 12
"""Look from which on "always" counts: a shock is over."""

Runs = dict[Plant, list[Outcome]]
Run = Callable[[Plant, int], Outcome | None]
"""Plant and seed to outcome; None if a plant has no such run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a contender gives and costs over all plants and seeds."""

    japanese: tuple[float, ...]
    """Mean share of Japanese in percent, by gain."""
    over: float
    """Mean share of looks with the true loss over the tolerance, in percent."""
    ends_over: float
    """Share of runs that end over the tolerance, in percent."""
    worst_end: float
    """Largest true loss at the end in percent."""
    moves: float
    turns: float
    most_turns: int
    paused: float
    """Share of runs that pause, in percent."""


def contenders(evidences: Evidences) -> dict[str, Run]:
    """Return every contender by the name in the table."""

    def steered(settings: GuardSection) -> Run:
        def run(plant: Plant, seed: int) -> Outcome:
            return simulate(plant, settings, seed, evidences=evidences)

        return functools.cache(run)

    two_way = steered(TWO_WAY)

    def yoked(plant: Plant, seed: int) -> Outcome:
        steered_run = two_way(plant, seed)
        assert steered_run is not None
        share = 1 - steered_run.japanese / 100
        return simulate(plant, FIXED, seed, evidences="normal", start_share=share)

    def best_fixed(from_look: int) -> Run:
        def run(plant: Plant, seed: int) -> Outcome | None:
            share = best_fixed_share(plant, from_look=from_look)
            return (
                None
                if share is None
                else simulate(plant, FIXED, seed, evidences="normal", start_share=share)
            )

        return run

    return {
        "two-way": two_way,
        "two-way, mix may be undercut": steered(FREE),
        "ladder": steered(LADDER),
        "fixed at the two-way's mean": yoked,
        "best fixed, end": best_fixed(-1),
        "best fixed, always": best_fixed(SETTLED_LOOK),
    }


def run_all(run: Run, seeds: Sequence[int], *, is_random: bool) -> Runs:
    """Run one contender on every plant.

    Args:
        run: The contender.
        seeds: Seeds of the readings.
        is_random: Whether the outcome depends on the seed; otherwise one is enough.
    """
    runs: Runs = {}
    for plant in PLANTS:
        runs[plant] = []
        for seed in seeds if is_random else seeds[:1]:
            outcome = run(plant, seed)
            if outcome is not None:
                runs[plant].append(outcome)
    return runs


def figures_of(runs: Runs) -> Figures:
    """Return the figures of one contender."""
    japanese = []
    for gain in GAINS:
        found = []
        for plant, outcomes in runs.items():
            if plant.gain == gain:
                found += [outcome.japanese for outcome in outcomes]
        japanese.append(statistics.fmean(found))
    everything = [outcome for outcomes in runs.values() for outcome in outcomes]
    return Figures(
        japanese=tuple(japanese),
        over=statistics.fmean(one.over for one in everything),
        ends_over=100 * statistics.fmean(one.end > TOLERANCE for one in everything),
        worst_end=max(one.end for one in everything),
        moves=statistics.fmean(one.moves for one in everything),
        turns=statistics.fmean(one.turns for one in everything),
        most_turns=max(one.turns for one in everything),
        paused=100 * statistics.fmean(one.paused for one in everything),
    )


def table(figures: dict[str, Figures]) -> str:
    """Return the figures of all contenders as a table in Markdown."""
    gains = " / ".join(f"{gain:g}" for gain in GAINS)
    lines = [
        f"| contender | Japanese % at gain {gains} | looks over the tolerance % | ends over % | "
        "worst end % | moves | turns (most) | paused % |",
        "|" + "---|" * 8,
    ]
    for name, one in figures.items():
        japanese = " / ".join(f"{value:.1f}" for value in one.japanese)
        lines.append(
            f"| {name} | {japanese} | {one.over:.1f} | {one.ends_over:.1f} | {one.worst_end:.2f} | "
            f"{one.moves:.1f} | {one.turns:.1f} ({one.most_turns}) | {one.paused:.1f} |"
        )
    return "\n".join(lines)
