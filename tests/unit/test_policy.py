"""The guard warns when held-out text got worse for certain, and only then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.errors import CptError
from cpt.guard.heldout import Guard
from cpt.guard.policy import judge
from cpt.guard.score import DomainScore, bits_per_byte

TOLERANCE_PERCENT = 1.0
NUM_DOCUMENTS = 200


def scores(nats: np.ndarray, num_bytes: np.ndarray) -> DomainScore:
    return DomainScore(name="english", language="en", nats=nats, bytes=num_bytes)


@pytest.fixture
def baseline() -> DomainScore:
    """Documents of very different length and difficulty, as text is."""
    generator = np.random.default_rng(1)
    num_bytes = np.round(np.exp(generator.normal(7, 1, NUM_DOCUMENTS)))
    return scores(num_bytes * generator.uniform(0.4, 1.2, NUM_DOCUMENTS), num_bytes)


def changed(baseline: DomainScore, percent: float, noise_percent: float, seed: int = 2) -> DomainScore:
    """Every document `percent` worse on average, single ones by `noise_percent` more or less."""
    noise = np.random.default_rng(seed).normal(0, noise_percent / 100, len(baseline.nats))
    return dataclasses.replace(baseline, nats=baseline.nats * (1 + percent / 100 + noise))


def test_same_scores_give_the_same_judgement(baseline: DomainScore) -> None:
    now = changed(baseline, 1.2, 3)
    assert judge(now, baseline, TOLERANCE_PERCENT) == judge(now, baseline, TOLERANCE_PERCENT)


def test_unchanged_scores_have_no_interval(baseline: DomainScore) -> None:
    verdict = judge(baseline, baseline, TOLERANCE_PERCENT)
    assert (verdict.delta_percent, verdict.ci_low, verdict.ci_high, verdict.action) == (0, 0, 0, "none")


@pytest.mark.parametrize("seed", range(100, 120))
def test_noise_alone_leads_to_no_warning(baseline: DomainScore, seed: int) -> None:
    assert judge(changed(baseline, 0, 10, seed), baseline, TOLERANCE_PERCENT).action == "none"


@pytest.mark.parametrize("seed", range(100, 120))
def test_real_loss_leads_to_a_warning(baseline: DomainScore, seed: int) -> None:
    """A shift of 4 % with noise of 5 % per document: ten standard errors of the mean from the tolerance."""
    assert judge(changed(baseline, 4, 5, seed), baseline, TOLERANCE_PERCENT).action == "warn"


def test_gain_leads_to_no_warning(baseline: DomainScore) -> None:
    assert judge(changed(baseline, -5, 3), baseline, TOLERANCE_PERCENT).action == "none"


def test_mean_above_the_tolerance_is_not_enough(baseline: DomainScore) -> None:
    nats = baseline.nats.copy()
    nats[np.argmax(nats)] *= 1 + 0.02 * nats.sum() / nats.max()  # one document makes the whole difference: 2 %
    verdict = judge(dataclasses.replace(baseline, nats=nats), baseline, TOLERANCE_PERCENT)
    assert verdict.delta_percent == pytest.approx(2) and verdict.action == "none"


def test_tolerance_is_what_separates_warning_from_silence(baseline: DomainScore) -> None:
    now = changed(baseline, 4, 2)
    low = judge(now, baseline, 0).ci_low
    assert judge(now, baseline, low - 1e-9).action == "warn" and judge(now, baseline, low + 1e-9).action == "none"


def test_interval_is_much_narrower_than_for_unpaired_documents(baseline: DomainScore) -> None:
    """Documents differ by a factor of three; pairing takes that out and leaves the noise of the change."""
    verdict = judge(changed(baseline, 2, 1), baseline, TOLERANCE_PERCENT)
    assert verdict.ci_low <= verdict.delta_percent <= verdict.ci_high
    assert verdict.ci_high - verdict.ci_low < 1  # unpaired: over 10 percentage points


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_interval_covers_the_truth_about_as_often_as_it_says(shift: float) -> None:
    """95 % nominal; 200 trials of 60 documents: a bootstrap of this size covers 90 % or more."""
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        num_bytes = generator.uniform(500, 2000, 60)
        before = scores(num_bytes * 0.7, num_bytes)
        verdict = judge(changed(before, shift, 5, seed + 1000), before, TOLERANCE_PERCENT)
        covered += verdict.ci_low <= shift <= verdict.ci_high
    assert covered / 200 >= 0.88


def test_baseline_is_in_bits_per_byte(baseline: DomainScore) -> None:
    verdict = judge(changed(baseline, 3, 0), baseline, TOLERANCE_PERCENT)
    assert verdict.baseline == baseline.bits_per_byte


def test_one_bit_for_every_byte_is_one() -> None:
    assert bits_per_byte(np.log(2) * np.array([3.0, 5.0]), np.array([3.0, 5.0])) == pytest.approx(1)


def test_scores_of_different_documents_are_not_compared(baseline: DomainScore) -> None:
    other = dataclasses.replace(baseline, bytes=baseline.bytes + 1)
    with pytest.raises(AssertionError, match="paired"):
        judge(other, baseline, TOLERANCE_PERCENT)


def test_domain_without_a_document_is_refused_by_name(tmp_path: Path) -> None:
    """A small source with a small held_out_share; passed over, the domain would look guarded and never warn."""
    domain = SimpleNamespace(name="english", language="en", num_documents=0, document_bytes=[], num_rows=0)
    data: Any = SimpleNamespace(held_out=(domain,), manifest=SimpleNamespace(fingerprint="f"))
    config: Any = SimpleNamespace(guard=SimpleNamespace(max_documents=4))
    topology: Any = SimpleNamespace(rank=0)
    with pytest.raises(CptError, match="english"):
        Guard(data, config, topology, tmp_path)
