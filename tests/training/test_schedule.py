"""The learning rate is a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cpt.config import TrainSection
from cpt.errors import ConfigError
from cpt.training.schedule import factors_of_run, learning_rate, with_decay_steps
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig

PEAK = 1e-3
FLOOR = 1e-4


def settings(**keys: Any) -> TrainSection:
    return TrainSection(
        **{
            "seq_len": 8,
            "global_batch_size": 1,
            "total_steps": 100,
            "lr": PEAK,
            "min_lr_ratio": FLOOR / PEAK,
            **keys,
        }
    )


def rates(train: TrainSection, steps: Iterable[int]) -> list[float]:
    return [learning_rate(step, train) for step in steps]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    train = settings(schedule=schedule, warmup_steps=9)
    assert rates(train, range(10)) == pytest.approx([PEAK * nth / 10 for nth in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_first_step_learns_without_a_warmup(schedule: str) -> None:
    assert learning_rate(0, settings(schedule=schedule)) == PEAK


def test_cosine_is_at_the_middle_halfway_after_the_warmup() -> None:
    assert learning_rate(60, settings(warmup_steps=20)) == pytest.approx((PEAK + FLOOR) / 2)


def test_cosine_never_rises_after_the_warmup() -> None:
    found = rates(settings(warmup_steps=20), range(20, 120))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("step", [100, 101, 10_000])
def test_cosine_stays_on_the_floor_after_the_end(step: int) -> None:
    assert learning_rate(step, settings()) == pytest.approx(FLOOR)


def test_constant_stays_at_the_peak() -> None:
    train = settings(schedule="constant", warmup_steps=5)
    assert set(rates(train, range(5, 200))) == {PEAK}


def test_wsd_is_stable_until_its_decay() -> None:
    train = settings(schedule="wsd", warmup_steps=10, decay_steps=20)
    assert set(rates(train, range(10, 80))) == {PEAK}


def test_wsd_falls_in_equal_steps_to_the_floor_at_the_last_step() -> None:
    train = settings(schedule="wsd", decay_steps=20)
    expected = [PEAK - (PEAK - FLOOR) * fall / 20 for fall in range(21)]
    assert rates(train, range(79, 100)) == pytest.approx(expected)


def test_wsd_without_a_decay_stays_at_the_peak() -> None:
    assert set(rates(settings(schedule="wsd"), range(100))) == {PEAK}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_stopping_early_leaves_the_schedule_unchanged(schedule: str) -> None:
    keys = {"schedule": schedule, "warmup_steps": 5, "decay_steps": 10 if schedule == "wsd" else 0}
    stopped = settings(**keys, stop_at_step=30)
    assert rates(settings(**keys), range(30)) == rates(stopped, range(30))


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_rate_of_a_step_does_not_depend_on_what_was_asked_before(schedule: str) -> None:
    train = settings(schedule=schedule, warmup_steps=5)
    forwards = rates(train, range(100))
    backwards = rates(train, reversed(range(100)))
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_floor_of_one_keeps_the_peak(schedule: str) -> None:
    keys = {"decay_steps": 50} if schedule == "wsd" else {}
    train = settings(schedule=schedule, min_lr_ratio=1.0, **keys)
    assert rates(train, range(100)) == pytest.approx([PEAK] * 100)


def mix_of(*phases: SchedulePhase) -> MixConfig:
    web = SourceConfig(name="web", language="en", domain="web", format="mock", weight=1.0)
    return MixConfig(seq_len=8, seed=1, sources=(web,), schedule=phases)


PHASES = (SchedulePhase(name="main", share=0.9), SchedulePhase(name="anneal", share="rest"))


def test_the_decay_begins_with_the_first_step_of_its_phase() -> None:
    train = settings(schedule="wsd", decay_phase="anneal", min_lr_ratio=0.0)
    tied = with_decay_steps(train, mix_of(*PHASES))
    assert tied.decay_steps == 10
    assert rates(tied, (88, 89)) == [PEAK, PEAK]
    assert rates(tied, (90, 99)) == pytest.approx([0.9 * PEAK, 0.0])
    constant = settings(schedule="constant")
    assert with_decay_steps(constant, mix_of()) is constant


@pytest.mark.parametrize(
    ("keys", "phases", "message"),
    [
        ({"decay_phase": "aneal"}, PHASES, "is no phase of the mix. Did you mean 'anneal'"),
        ({"decay_phase": "anneal"}, (), "The mix has no schedule"),
        ({"decay_phase": "anneal", "warmup_steps": 95}, PHASES, "begins after step 90, but the"),
        ({"decay_phase": "anneal", "total_steps": 3}, PHASES, "has no step in a run of 3 steps"),
    ],
)
def test_a_phase_that_no_decay_can_begin_with_is_refused(
    keys: dict[str, Any], phases: tuple[SchedulePhase, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_decay_steps(settings(schedule="wsd", **keys), mix_of(*phases))


def test_a_decay_phase_stands_alone_and_needs_a_decay() -> None:
    both = settings(schedule="wsd", decay_phase="anneal", decay_steps=5)
    assert ("decay_phase", "and decay_steps") in [(key, text[:15]) for key, text in both.check()]
    cosine = settings(schedule="cosine", decay_phase="anneal")
    assert "only schedule: wsd has a decay" in dict(cosine.check())["decay_phase"]


FACTORED = (
    SchedulePhase(name="main", until_step=40),
    SchedulePhase(name="shift", until_step=60, lr_factor=1.0, to_lr_factor=0.5),
    SchedulePhase(name="low", until_step=90, lr_factor=0.5),
    SchedulePhase(name="end", share="rest", lr_factor=0.5, to_lr_factor=0.0),
)


@pytest.mark.parametrize(
    "keys",
    [
        {"schedule": "constant"},
        {"schedule": "cosine", "warmup_steps": 9},
        {"schedule": "wsd", "decay_steps": 20},
    ],
)
def test_a_phase_multiplies_the_rate_of_the_run_and_a_line_ends_at_its_last_step(
    keys: dict[str, Any],
) -> None:
    train = settings(**keys)
    factors = factors_of_run(train, mix_of(*FACTORED))
    expected = [1.0] * 40
    expected += [1 - 0.5 * nth / 20 for nth in range(1, 21)]
    expected += [0.5] * 30
    expected += [0.5 - 0.5 * nth / 10 for nth in range(1, 11)]
    found = [learning_rate(step, train, factors) for step in range(100)]
    planned = rates(train, range(100))
    assert found == pytest.approx([a * b for a, b in zip(planned, expected, strict=True)])
    assert learning_rate(120, train, factors) == 0.0


def test_phases_without_a_factor_leave_the_rate_bit_for_bit() -> None:
    train = settings(warmup_steps=7)
    assert factors_of_run(train, mix_of(*PHASES)) == ()
    assert factors_of_run(train, mix_of()) == ()
    assert factors_of_run(settings(total_steps=0), mix_of(*FACTORED)) == ()


def test_factors_that_make_the_rate_too_large_are_refused_by_phase() -> None:
    phases = (
        SchedulePhase(name="main", share=0.5, lr_factor=100),
        SchedulePhase(name="end", share=0.5, to_lr_factor=99),
    )
    with pytest.raises(ConfigError) as caught:
        factors_of_run(settings(lr=2e-3), mix_of(*phases))
    assert len(caught.value.problems) == 2
    assert "schedule[main] of the mix has a factor of 100" in str(caught.value)
