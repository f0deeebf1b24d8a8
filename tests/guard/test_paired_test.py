"""The guard knows what got worse for certain, and how much it can tell."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cpt.guard.paired_test import compare_scores, effective_documents, margin_of_error
from cpt.guard.score import DomainScore, bits_per_byte
from cpt.guard.student import student_quantile

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
    assert compare_scores(now, baseline) == compare_scores(now, baseline)


def test_unchanged_scores_have_no_interval(baseline: DomainScore) -> None:
    change = compare_scores(baseline, baseline)
    assert change.delta_percent == change.ci_low == change.ci_high == change.upper_bound == 0


def test_score_that_is_not_a_number_has_no_bound(baseline: DomainScore) -> None:
    nats = baseline.nats.copy()
    nats[3] = np.nan
    change = compare_scores(dataclasses.replace(baseline, nats=nats), baseline)
    assert math.isnan(change.upper_bound) and math.isnan(change.delta_percent)


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
    assert compare_scores(single, single).upper_bound == math.inf


def test_interval_is_much_narrower_than_for_unpaired_documents(baseline: DomainScore) -> None:
    """Documents differ by a factor of three; pairing leaves nothing but the noise of the change."""
    change = compare_scores(changed(baseline, 2, 1), baseline)
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
        change = compare_scores(changed(before, shift, 5, seed + 1000), before)
        covered += change.ci_low <= shift <= change.ci_high
    assert covered / 200 >= 0.88


def test_interval_of_few_documents_is_wide_enough() -> None:
    """Of 6 documents the bootstrap alone, nominal 95 %, covers 82 %."""
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        before = scores(generator.uniform(600, 700, 6), np.full(6, 1000.0))
        change = compare_scores(changed(before, 1.0, 2, seed + 1000), before)
        covered += change.ci_low <= 1.0 <= change.ci_high
    assert covered / 200 >= 0.92


@pytest.mark.parametrize("skewed", [False, True])
def test_loss_is_above_the_upper_bound_in_about_one_look_of_twenty(skewed: bool) -> None:
    missed = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        before = np.exp(generator.normal(6, 0.6, 256))
        noise = generator.normal(size=256)
        if skewed:
            noise = (math.exp(0.5) - np.exp(noise)) / math.sqrt((math.e - 1) * math.e)
        now = before * (1 + (1 + 2 * noise) / 100)
        delta = 100 * (now.sum() / before.sum() - 1)
        missed += delta + margin_of_error(now, before, 0.05) < 1
    assert missed / 400 <= 0.07


def test_documents_of_a_cluster_widen_the_bounds() -> None:
    """Documents of one package change alike, so many of them say little more than one."""
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(16), 16)
    before = scores(np.full(256, 700.0), np.full(256, 1000.0))
    noise = generator.normal(0, 0.02, 16)[clusters]
    now = dataclasses.replace(before, nats=before.nats * (1 + noise))
    alone = compare_scores(now, before)
    together = compare_scores(now, before, clusters=clusters)
    assert together.delta_percent == pytest.approx(alone.delta_percent)
    wider = (together.upper_bound - together.delta_percent) / (
        alone.upper_bound - alone.delta_percent
    )
    assert 3.5 < wider < 5
    assert together.ci_high - together.ci_low > 3 * (alone.ci_high - alone.ci_low)


def test_baseline_is_in_bits_per_byte(baseline: DomainScore) -> None:
    change = compare_scores(changed(baseline, 3, 0), baseline)
    assert change.baseline == baseline.bits_per_byte


def test_one_bit_for_every_byte_is_one() -> None:
    assert bits_per_byte(np.log(2) * np.array([3.0, 5.0]), np.array([3.0, 5.0])) == pytest.approx(1)


def test_scores_of_different_documents_are_not_compared(baseline: DomainScore) -> None:
    other = dataclasses.replace(baseline, bytes=baseline.bytes + 1)
    with pytest.raises(AssertionError, match="paired"):
        compare_scores(other, baseline)
