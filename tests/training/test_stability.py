"""What is a spike, what is skipped, and when it is time to roll back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cpt.training.stability import (
    MIN_STEPS,
    NEW_LEVEL_AFTER,
    ROLLBACK_AFTER,
    WINDOW_STEPS,
    Stability,
)

NAN = float("nan")


def settled(steps: int = 64) -> Stability:
    """Return the stability after ordinary steps: losses 3.0 +- 0.1, norms 1.0 +- 0.1."""
    stability = Stability()
    random = np.random.default_rng(0)
    losses = random.normal(3.0, 0.1, steps)
    norms = random.normal(1.0, 0.1, steps)
    for loss, norm in zip(losses, norms, strict=True):
        assert stability.assess(float(loss), float(norm), applied=True) == "sound"
    return stability


@pytest.mark.case("N4", "spike logged with its rows, window not poisoned, next step accepted")
def test_spike_is_told_and_does_not_move_the_limits() -> None:
    stability = settled()
    before = stability.limits()
    assert stability.assess(150.0, 50.0, applied=True) == "spike"
    assert stability.limits() == before
    assert stability.assess(3.05, 1.02, applied=True) == "sound"


def test_limits_are_six_deviations_above_the_mean() -> None:
    stability = Stability()
    for step in range(MIN_STEPS):
        stability.assess(3.0 + (-1) ** step, 2.0 + (-1) ** step, applied=True)
    assert stability.limits().loss == pytest.approx(3.0 + 6.0)
    assert stability.limits().grad_norm == pytest.approx(2.0 + 6.0)
    assert stability.assess(8.9, 100.0, applied=True) == "sound"


@pytest.mark.parametrize(("loss", "norm"), [(150.0, 1.0), (3.0, 50.0)])
def test_loss_or_norm_alone_is_no_spike(loss: float, norm: float) -> None:
    assert settled().assess(loss, norm, applied=True) == "sound"


def test_nothing_is_a_spike_while_too_little_is_known() -> None:
    assert settled(MIN_STEPS - 1).assess(150.0, 50.0, applied=True) == "sound"


def test_spikes_in_a_row_become_the_new_level() -> None:
    stability = settled()
    for step in range(NEW_LEVEL_AFTER):
        assert stability.assess(20.0 + step / 10, 9.0, applied=True) == "spike"
    assert stability.assess(20.3, 9.0, applied=True) == "sound"


def test_window_forgets_what_is_older() -> None:
    stability = settled(WINDOW_STEPS + 50)
    assert len(stability.to_json()["losses"]) == WINDOW_STEPS


@pytest.mark.case("N3", "rollback asked for at the third in a row, not before")
def test_third_step_in_a_row_without_an_update_asks_for_a_rollback() -> None:
    stability = settled()
    assert stability.assess(NAN, NAN, applied=False) == "skipped"
    assert stability.assess(3.0, 1.0, applied=True) == "sound"
    outcomes = [stability.assess(NAN, NAN, applied=False) for _ in range(ROLLBACK_AFTER)]
    assert outcomes == ["skipped", "skipped", "rollback"] and stability.skipped_total == 4


def test_values_that_are_not_finite_never_enter_the_window() -> None:
    stability = settled()
    before = stability.limits()
    stability.assess(NAN, float("inf"), applied=False)
    assert stability.limits() == before


def test_state_goes_through_json_and_goes_on_alike() -> None:
    first = settled()
    first.assess(150.0, 50.0, applied=True)
    first.assess(NAN, NAN, applied=False)
    second = Stability(json.loads(json.dumps(first.to_json())))
    for stability in (first, second):
        stability.assess(3.1, 1.1, applied=True)
    assert first.to_json() == second.to_json() and first.limits() == second.limits()
