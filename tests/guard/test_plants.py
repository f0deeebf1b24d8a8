"""On eighteen simulated models that forget, the two-way controller keeps English and spares
Japanese.
"""

from __future__ import annotations

import functools
import statistics

import pytest

from bench.guard_plants_parts.plants import (
    PLANTS,
    START_SHARE,
    TOLERANCE,
    Evidences,
    Outcome,
    Plant,
    best_fixed_share,
    simulate,
)
from cpt.config import GuardSection

TWO_WAY = GuardSection(interval_steps=200)
LADDER = GuardSection(interval_steps=200, controller="ladder")
SEEDS = range(3)
"""Runs of every plant; bench/guard_plants.py has 20."""
LEAD_SEEDS = range(10)
"""Runs of the plants of gain 1, because the lead varies with the panel that a run draws."""
MAX_TURNS = 5
MIN_LEAD = 10.0
"""Points of Japanese over the ladder at gain 1."""

by_plant = pytest.mark.parametrize("plant", PLANTS, ids=[plant.name for plant in PLANTS])


@functools.cache
def outcomes(
    plant: Plant, settings_name: str, evidences: Evidences = "bets"
) -> tuple[Outcome, ...]:
    settings = {"two_way": TWO_WAY, "ladder": LADDER}[settings_name]
    seeds = LEAD_SEEDS if plant.gain == 1 and evidences == "bets" else SEEDS
    return tuple(simulate(plant, settings, seed, evidences=evidences) for seed in seeds)


def mean_japanese(gain: float, settings_name: str) -> float:
    found = []
    for plant in PLANTS:
        if plant.gain == gain:
            found += [run.japanese for run in outcomes(plant, settings_name)]
    return statistics.fmean(found)


@by_plant
def test_no_run_ends_over_its_tolerance(plant: Plant) -> None:
    assert max(run.end for run in outcomes(plant, "two_way")) <= TOLERANCE


@by_plant
def test_replay_does_not_swing_and_no_run_pauses(plant: Plant) -> None:
    runs = outcomes(plant, "two_way")
    assert max(run.turns for run in runs) <= MAX_TURNS
    assert not any(run.paused for run in runs)


@by_plant
def test_readings_of_other_documents_at_each_look_are_no_reason_to_swing(plant: Plant) -> None:
    runs = outcomes(plant, "two_way", "fresh")
    assert max(run.end for run in runs) <= TOLERANCE
    assert max(run.turns for run in runs) <= MAX_TURNS


def test_japanese_has_ten_points_more_than_under_the_ladder_at_gain_1() -> None:
    assert mean_japanese(1.0, "two_way") >= mean_japanese(1.0, "ladder") + MIN_LEAD


@pytest.mark.parametrize("gain", [0.3, 2.0])
def test_japanese_has_no_less_than_under_the_ladder_at_other_gains(gain: float) -> None:
    assert mean_japanese(gain, "two_way") >= mean_japanese(gain, "ladder")


def test_share_falls_again_after_a_passing_shock() -> None:
    plant = Plant(gain=1.0, lag=2, shock=2.5)
    runs = outcomes(plant, "two_way")
    highest = statistics.fmean(max(run.shares) for run in runs)
    assert statistics.fmean(run.shares[-1] for run in runs) < 0.9 * highest
    for run in outcomes(plant, "ladder"):
        assert run.shares[-1] == max(run.shares)


def test_mix_that_may_be_undercut_gives_japanese_more_where_little_is_lost() -> None:
    plant = Plant(gain=0.3, lag=10, shock=0.0)
    lower = GuardSection(interval_steps=200, least_replay=0.2)
    bounded = outcomes(plant, "two_way")
    free = [simulate(plant, lower, seed) for seed in SEEDS]
    assert min(run.shares[-1] for run in bounded) >= START_SHARE
    assert statistics.fmean(run.shares[-1] for run in free) < START_SHARE
    gained = statistics.fmean(run.japanese for run in free)
    assert gained > statistics.fmean(run.japanese for run in bounded)
    assert max(run.end for run in free) <= TOLERANCE


def test_fixed_share_that_is_tolerable_at_the_end_may_not_be_so_before() -> None:
    plant = Plant(gain=1.0, lag=10, shock=0.0)
    at_end = best_fixed_share(plant, from_look=-1)
    always = best_fixed_share(plant, from_look=12)
    assert at_end is not None and always is not None and at_end < always
