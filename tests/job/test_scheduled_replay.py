"""A run crosses phases of its mix while the guard has raised replay, unbroken or resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cpt.config import GuardSection
from cpt.guard.decision import decide
from cpt.guard.ladder import GuardState
from cpt.guard.replay_share import ReplayShares
from cpt.guard.yardstick import Evidence, Reading
from cpt.job.guard_levers import lever_limits
from cpt.job.job import Job
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.mixture.ledger import Ledger, resume_ledger
from tests.job.test_micro_batches import GLOBAL_BATCH_SIZE, ROWS, Data, make_job

TOTAL_STEPS = 120
RAISE_STEP = 30
"""Steps done when the guard raises replay, in the middle of the linear phase."""
SOURCES = (
    SourceConfig(
        name="en", language="en", domain="web", format="mock", weight=0.3, held_out_share=0.1
    ),
    SourceConfig(name="ja", language="ja", domain="web", format="mock", weight=0.7),
)
MIX = MixConfig(
    seq_len=8,
    seed=3,
    sources=SOURCES,
    guard=GuardConfig(domains=(GuardDomain(name="english", language="en", sources=("en",)),)),
    schedule=(
        SchedulePhase(name="main", until_step=20),
        SchedulePhase(
            name="shift",
            until_step=60,
            weights={"en": 0.3, "ja": 0.7},
            to={"en": 0.1, "ja": 0.9},
        ),
        SchedulePhase(name="japanese", until_step=90, weights={"ja": 1.0}),
        SchedulePhase(name="anneal", share="rest", weights={"en": 0.5, "ja": 0.5}),
    ),
)


class Guarded:
    """The guard of a job, as far as `lever_limits` looks at it."""

    domain_names = ("english",)

    def __init__(self, state: GuardState) -> None:
        self.state = state


def scheduled_job(step: int, ledger: Ledger, state: GuardState) -> Job:
    """Return a run that has done some steps."""
    job = make_job(Data(), total_steps=TOTAL_STEPS)
    context: Any = job.context
    context.mix = MIX
    train = context.config.train
    train.warmup_steps = 0
    train.kl_weight = None
    job.progress.step = step
    data: Any = job.data
    job.replay = ReplayShares(MIX, data, 0.75)
    guard: Any = Guarded(state)
    job.guard = guard
    job._follow(ledger)
    return job


def red(share: float, largest_share: float) -> Evidence:
    reading = Reading(
        domain="english",
        step=RAISE_STEP,
        state="red",
        delta=4.0,
        lower_bound=3.0,
        tolerance=1.0,
        hard_limit=50.0,
    )
    return Evidence.of(reading, RAISE_STEP, share, largest_share)


def raised_job(controller: Any) -> tuple[Job, float]:
    """Return a run whose guard raises English, and by how many points."""
    ledger = Ledger.start(MIX, total_steps=TOTAL_STEPS)
    job = scheduled_job(RAISE_STEP, ledger, GuardState())
    assert job.guard is not None
    limits = lever_limits(job)
    share, largest_share = limits.shares["english"]
    assert share == pytest.approx(0.25)  # a quarter of the way from 0.3 to 0.1
    settings = GuardSection(controller=controller)
    evidence = [red(share, largest_share)]
    state, decision = decide(GuardState(over={"english": 1}), evidence, settings, limits)
    assert decision.actions["english"] == "raise_replay"
    job.guard.state = state
    job.reweigh(state)
    return job, {**state.shares, **state.replay}.popitem()[1] - 0.25


def english_share(job: Job, first_step: int, stop_step: int) -> float:
    sources = []
    for step in range(first_step, stop_step):
        sources.append(job.mixture.global_batch(step, GLOBAL_BATCH_SIZE).sources)
    return float(np.mean(np.concatenate(sources) == 0))


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
def test_a_raise_holds_on_through_all_later_phases(controller: Any) -> None:
    job, points = raised_job(controller)
    assert points > 0.02
    rows = GLOBAL_BATCH_SIZE
    for first, stop, planned in ((30, 60, 0.175), (60, 90, 0.0), (90, 120, 0.5)):
        within = 1 / (rows * (stop - first))
        share = english_share(job, first, stop)
        assert share == pytest.approx(planned + points, abs=within + 1e-9)
    assert english_share(job, 0, 20) == pytest.approx(0.3, abs=1 / (20 * rows))


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
def test_a_run_that_is_resumed_at_any_step_has_the_rows_of_the_unbroken_one(
    controller: Any,
) -> None:
    job, _ = raised_job(controller)
    assert job.guard is not None
    stored = json.loads(json.dumps(job.ledger.to_json()))
    state = GuardState.from_json(json.loads(json.dumps(job.guard.state.to_json())))
    for step in range(RAISE_STEP, TOTAL_STEPS, 7):
        ledger = resume_ledger(stored, MIX, step, accept_change=False, total_steps=TOTAL_STEPS)
        resumed = scheduled_job(step, ledger, state)
        resumed.reweigh(state)
        assert resumed.ledger == job.ledger
        expected = job.mixture.global_batch(step, GLOBAL_BATCH_SIZE)
        assert resumed.next_global_batch().chain_hash("") == expected.chain_hash("")


@pytest.mark.parametrize("step", [45, 60, 75, 95])
def test_a_later_look_without_an_action_changes_no_row(step: int) -> None:
    job, points = raised_job("two_way")
    assert job.guard is not None
    job.progress.step = step
    limits = lever_limits(job)
    share, _ = limits.shares["english"]
    planned = MIX.schedule[-1].weights["en"] if step >= 90 else max(0.0, 0.3 - (step - 20) / 200)
    if 60 <= step < 90:
        planned = 0.0
    assert share == pytest.approx(planned + points)
    reading = Reading(
        domain="english",
        step=step,
        state="green",
        delta=0.5,
        lower_bound=0.0,
        tolerance=1.0,
        hard_limit=50.0,
    )
    # at its set point, long enough for nothing to move
    settled = GuardState.from_json({**job.guard.state.to_json(), "smoothed": {"english": 0.5}})
    evidence = [Evidence.of(reading, step, share, 1.0)]
    state, decision = decide(settled, evidence, GuardSection(set_point=0.5), limits)
    assert decision.action == "none" and state.planned == limits.planned
    before = job.ledger
    job.reweigh(state)
    assert job.ledger is before


def capped_mix(**ceilings: float) -> MixConfig:
    """Return the mix with ceilings on the epochs of English in some phases."""
    schedule = []
    for phase in MIX.schedule:
        limit = {"en": ceilings[phase.name]} if phase.name in ceilings else {}
        schedule.append(replace(phase, max_epochs=limit))
    return replace(MIX, schedule=tuple(schedule))


def largest_raise(mix: MixConfig, step: int) -> tuple[Job, float]:
    """Return a run at a step and by how many points the guard could raise English."""
    ledger = Ledger.start(mix, total_steps=TOTAL_STEPS)
    job = scheduled_job(step, ledger, GuardState())
    context: Any = job.context
    context.mix = mix
    data: Any = job.data
    job.replay = ReplayShares(mix, data, 0.9)
    share, largest = lever_limits(job).shares["english"]
    assert share is not None
    return job, largest - share


def draw_all(job: Job, step: int) -> None:
    """Draw the rows from a step on, which refuses a phase that reads a source too often."""
    for number in range(step, TOTAL_STEPS):
        job.mixture.global_batch(number, GLOBAL_BATCH_SIZE)


@pytest.mark.parametrize(
    ("ceilings", "step"),
    [({"anneal": 216}, 30), ({"shift": 150}, 30), ({"shift": 150, "anneal": 216}, 25)],
    ids=["later", "present", "both"],
)
def test_a_raise_leaves_every_phase_the_epochs_that_it_allows(
    ceilings: dict[str, int], step: int
) -> None:
    _, free = largest_raise(MIX, step)
    mix = capped_mix(**{name: rows / ROWS for name, rows in ceilings.items()})
    job, points = largest_raise(mix, step)
    assert 0.01 < points < free - 0.05
    state = GuardState(
        replay={"en": 0.3 - (step - 20) / 200 + points}, planned=job.present_replay()._planned()
    )
    job.reweigh(state)
    assert job.ledger.segment_at(95).weights["en"] == pytest.approx(0.5 + points)
    draw_all(job, step)
    too_much = replace(state, replay={"en": state.replay["en"] + 0.05})
    job.reweigh(too_much)
    with pytest.raises(DataError, match="within phase"):
        draw_all(job, step)
