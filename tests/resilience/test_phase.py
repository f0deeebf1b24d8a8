"""The phase clock counts phases and learns how long a step usually takes."""

from __future__ import annotations

from cpt.resilience.phase import PhaseClock


def test_clock_knows_the_median_step_once_there_were_three() -> None:
    clock = PhaseClock()
    for step in range(1, 4):
        clock.enter("data", step)
        clock.enter("forward", step)
    assert clock.median_step_seconds() is None
    clock.enter("data", 4)
    median = clock.median_step_seconds()
    assert median is not None and 0 <= median < 1 and clock.now().count == 7
