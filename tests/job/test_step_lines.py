"""The log has a line per N steps with loss, speed, time left, memory and goodput."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

from cpt.job.step_lines import StepLines


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **more: Any) -> dict[str, Any]:
    event = {
        "step": number,
        "loss": 2.5,
        "tokens": 1000,
        "slots": 1000,
        "seconds": 0.5,
        "peak_memory_bytes": 2**31,
    }
    return {**event, **more}


def lines(
    clock: Clock,
    *,
    first_step: int = 0,
    last_step: int = 30,
    interval_steps: int = 10,
    goodput: Callable[[], float] = lambda: 0.813,
) -> StepLines:
    return StepLines(
        first_step=first_step,
        last_step=last_step,
        interval_steps=interval_steps,
        memory_kind="GPU",
        goodput=goodput,
        clock=clock,
    )


def run(told: StepLines, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    for number in steps:
        clock.now += seconds
        told.take(step(number))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_first_step_every_tenth_and_the_last_have_a_line(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    run(lines(clock, first_step=3, last_step=25), clock, range(4, 26))
    assert [text.split(":")[0] for text in log.messages] == [
        "step 4/25",
        "step 10/25",
        "step 20/25",
        "step 25/25",
    ]


def test_line_has_every_figure(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    told = lines(clock)
    clock.now += 60
    told.take(step(1, utilization=0.331))
    assert log.messages == [
        "step 1/30: loss 2.5000, 2,000 tokens/s, 0:29:00 left, peak memory 2.0 GiB (GPU), "
        "utilization 33.1 %, goodput 81.3 %"
    ]


def test_speed_is_that_of_all_slots_and_the_share_that_bears_loss_is_told(
    log: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    lines(clock).take(step(1, slots=4000))
    assert log.messages[0].startswith(
        "step 1/30: loss 2.5000 over 25 % of the tokens, 8,000 tokens/s, "
    )


def test_figures_that_nobody_knows_are_left_out(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    run(lines(clock, goodput=lambda: math.nan), clock, range(1, 2))
    assert log.messages[0].endswith("peak memory 2.0 GiB (GPU)")


def test_time_left_follows_the_newest_pace(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    told = lines(clock, last_step=1000, interval_steps=100)
    run(told, clock, range(1, 101), seconds=60)
    run(told, clock, range(101, 201), seconds=1)
    assert "0:13:20 left" in log.messages[-1]  # 800 steps of one second


def test_rollback_begins_a_new_pace(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    told = lines(clock)
    run(told, clock, range(1, 16))
    run(told, clock, range(10, 21), seconds=2)
    by_step = [text for text in log.messages if text.startswith("step 10/")]
    assert "an unknown time left" in by_step[-1]
    assert log.messages[-1].startswith("step 20/30") and "0:00:20 left" in log.messages[-1]


def test_zero_turns_the_lines_off(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    run(lines(clock, interval_steps=0), clock, range(1, 31))
    assert log.messages == []
