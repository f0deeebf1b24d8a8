"""The guard knows what got worse for certain, and how much it can tell."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cpt.guard.paired_test import (
    DOCUMENT_SPREAD_PERCENT,
    compare_scores,
    decision_bound,
    effective_documents,
    noise_floor_percent,
    student_quantile,
)
from cpt.guard.score import DomainScore, bits_per_byte

NUM_TESTS = 60
NUM_DOCUMENTS = 200


def scores(nats: np.ndarray, num_bytes: np.ndarray) -> DomainScore:
    return DomainScore(name="english", language="en", nats=nats, bytes=num_bytes)


@pytest.fixture
def baseline() -> DomainScore:
    """Documents of very different length and difficulty, as text is."""
    generator = np.random.default_rng(1)
    num_bytes = np.round(np.exp(generator.normal(7, 1, NUM_DOCUMENTS)))
    return scores(num_bytes * generator.uniform(0.4, 1.2, NUM_DOCUMENTS), num_bytes)


def changed(
    baseline: DomainScore, percent: float, noise_percent: float, seed: int = 2
) -> DomainScore:
    """Make documents worse by `percent` on average, single ones by `noise_percent` more or less."""
    noise = np.random.default_rng(seed).normal(0, noise_percent / 100, len(baseline.nats))
    return dataclasses.replace(baseline, nats=baseline.nats * (1 + percent / 100 + noise))


def test_same_scores_give_the_same_change(baseline: DomainScore) -> None:
    now = changed(baseline, 1.2, 3)
    assert compare_scores(now, baseline, NUM_TESTS) == compare_scores(now, baseline, NUM_TESTS)


def test_unchanged_scores_have_no_interval(baseline: DomainScore) -> None:
    change = compare_scores(baseline, baseline, NUM_TESTS)
    assert change.delta_percent == change.ci_low == change.ci_high == change.lower_bound == 0


@pytest.mark.parametrize("seed", range(100, 120))
def test_decision_bound_is_never_above_the_interval(baseline: DomainScore, seed: int) -> None:
    change = compare_scores(changed(baseline, 1, 10, seed), baseline, NUM_TESTS)
    assert change.lower_bound <= change.ci_low <= change.delta_percent


@pytest.mark.parametrize("seed", range(100, 120))
def test_real_loss_is_certain(baseline: DomainScore, seed: int) -> None:
    """The documents count as some 70 equal ones, so 5 % with a noise of 5 % is 8 errors."""
    assert compare_scores(changed(baseline, 5, 5, seed), baseline, NUM_TESTS).lower_bound > 1


def test_mean_above_the_tolerance_is_not_enough(baseline: DomainScore) -> None:
    nats = baseline.nats.copy()
    # one document makes the whole difference of 2 %
    nats[np.argmax(nats)] *= 1 + 0.02 * nats.sum() / nats.max()
    change = compare_scores(dataclasses.replace(baseline, nats=nats), baseline, NUM_TESTS)
    assert change.delta_percent == pytest.approx(2) and change.lower_bound < 1


def test_more_tests_in_a_run_ask_for_more_certainty(baseline: DomainScore) -> None:
    now = changed(baseline, 4, 5)
    bounds = [decision_bound(now.nats, baseline.nats, count) for count in (1, 10, 1000)]
    assert bounds[0] > bounds[1] > bounds[2]


def test_score_that_is_not_a_number_has_no_bound(baseline: DomainScore) -> None:
    nats = baseline.nats.copy()
    nats[3] = np.nan
    change = compare_scores(dataclasses.replace(baseline, nats=nats), baseline, NUM_TESTS)
    assert math.isnan(change.lower_bound) and change.finite_bound is None


@pytest.mark.parametrize(
    ("tail", "degrees", "published"),
    [(0.025, 10, 2.228), (0.005, 30, 2.750), (0.001, 8, 4.501), (0.0005, 120, 3.373)],
)
def test_quantiles_are_those_of_the_tables(tail: float, degrees: int, published: float) -> None:
    """Abramowitz and Stegun, table 26.10."""
    assert student_quantile(tail, degrees) == pytest.approx(published, rel=3e-3)


def test_documents_that_outweigh_the_others_count_less(baseline: DomainScore) -> None:
    assert effective_documents(np.ones(50)) == pytest.approx(50)
    assert effective_documents(baseline.nats) < NUM_DOCUMENTS / 2
    assert effective_documents(np.array([1.0, 1000.0, 1.0])) < 1.01


def test_upper_bound_is_as_far_above_as_its_confidence_asks(baseline: DomainScore) -> None:
    now = changed(baseline, 1, 5)
    usual = compare_scores(now, baseline)
    final = compare_scores(now, baseline, upper_confidence=0.99)
    assert usual.delta_percent < usual.upper_bound < final.upper_bound
    degrees = effective_documents(baseline.nats) - 1
    ratio = (final.upper_bound - final.delta_percent) / (usual.upper_bound - usual.delta_percent)
    assert ratio == pytest.approx(student_quantile(0.01, degrees) / student_quantile(0.05, degrees))
    single = scores(np.array([500.0]), np.array([1000.0]))
    assert compare_scores(single, single).finite_upper_bound is None


def test_noise_floor_falls_with_the_number_of_documents() -> None:
    assert noise_floor_percent(np.ones(400), 60) == pytest.approx(
        3.6 * DOCUMENT_SPREAD_PERCENT / 20, rel=0.05
    )
    assert noise_floor_percent(np.ones(100), 60) > 1.9 * noise_floor_percent(np.ones(400), 60)
    with pytest.raises(ValueError, match="2 documents"):
        noise_floor_percent(np.ones(2), 60)


def test_interval_is_much_narrower_than_for_unpaired_documents(baseline: DomainScore) -> None:
    """Documents differ by a factor of three; pairing leaves nothing but the noise of the change."""
    change = compare_scores(changed(baseline, 2, 1), baseline, NUM_TESTS)
    assert change.ci_low <= change.delta_percent <= change.ci_high
    assert change.ci_high - change.ci_low < 1  # unpaired: over 10 percentage points


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_interval_covers_the_truth_about_as_often_as_it_says(shift: float) -> None:
    """95 % nominal; 200 trials of 60 documents: a bootstrap of this size covers 90 % or more."""
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        num_bytes = generator.uniform(500, 2000, 60)
        before = scores(num_bytes * 0.7, num_bytes)
        change = compare_scores(changed(before, shift, 5, seed + 1000), before, NUM_TESTS)
        covered += change.ci_low <= shift <= change.ci_high
    assert covered / 200 >= 0.88


def test_baseline_is_in_bits_per_byte(baseline: DomainScore) -> None:
    change = compare_scores(changed(baseline, 3, 0), baseline, NUM_TESTS)
    assert change.baseline == baseline.bits_per_byte


def test_one_bit_for_every_byte_is_one() -> None:
    assert bits_per_byte(np.log(2) * np.array([3.0, 5.0]), np.array([3.0, 5.0])) == pytest.approx(1)


def test_scores_of_different_documents_are_not_compared(baseline: DomainScore) -> None:
    other = dataclasses.replace(baseline, bytes=baseline.bytes + 1)
    with pytest.raises(AssertionError, match="paired"):
        compare_scores(other, baseline, NUM_TESTS)
