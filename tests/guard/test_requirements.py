"""A guard that could not do its work is refused from the mix and the settings alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.config import DomainLimits, GuardSection
from cpt.guard.requirements import (
    WARN_INSTEAD,
    documents_by_domain,
    domain_problems,
    guard_problems,
    num_tests,
    tolerance_problems,
)

STEPS = 1000


def guard_section(**changes: Any) -> GuardSection:
    return GuardSection(**{"interval_steps": 100, "tolerance_percent": 2.0, **changes})


def mix_of(domains: dict[str, tuple[str, ...]]) -> Any:
    named = [SimpleNamespace(name=name, sources=sources) for name, sources in domains.items()]
    return SimpleNamespace(guard_domains=lambda: tuple(named))


def manifest_of(held_out: dict[str, int]) -> Any:
    sources = [
        SimpleNamespace(name=name, held_out_documents=count) for name, count in held_out.items()
    ]
    return SimpleNamespace(sources=tuple(sources))


def test_misspelled_domain_is_named_with_the_nearest_one() -> None:
    settings = guard_section(domains={"englsh": DomainLimits(tolerance_percent=3.0)})
    problems = domain_problems(settings, {"english": None, "japanese": None})
    assert problems == [
        "guard.domains.englsh: the mix has no such held-out domain. Did you mean 'english'?"
    ]


def test_domain_without_a_document_is_named() -> None:
    problems = domain_problems(guard_section(), {"english": 0, "japanese": 300})
    assert len(problems) == 1 and "guard domain english holds no document" in problems[0]


def test_documents_of_a_domain_are_those_of_all_its_sources() -> None:
    mix = mix_of({"english": ("web", "books"), "japanese": ("ja",)})
    manifest = manifest_of({"web": 30, "books": 12, "ja": 7})
    assert documents_by_domain(mix, manifest) == {"english": 42, "japanese": 7}
    assert documents_by_domain(mix, None) == {"english": None, "japanese": None}


def test_tolerance_that_no_documents_of_this_number_can_show_is_refused_before_weights() -> None:
    problems = guard_problems(guard_section(), STEPS, {"english": 9}, is_measured=False)
    assert "guard domain english: 9 documents show changes of" in problems[0]
    assert problems[-1] == WARN_INSTEAD


@pytest.mark.parametrize("seed", range(20))
def test_no_refusal_before_weights_is_missing_from_the_one_after_the_measurement(seed: int) -> None:
    """Real documents differ in size, so they never show more than equally large ones."""
    generator = np.random.default_rng(seed)
    settings = guard_section(tolerance_percent=float(generator.uniform(0.3, 3.0)))
    count = int(generator.integers(3, 200))
    nats = np.exp(generator.normal(7, 1, count))
    before = guard_problems(settings, STEPS, {"english": count}, is_measured=False)
    after = tolerance_problems(settings, {"english": nats}, num_tests(settings, 1, STEPS))
    assert not before or after


def test_guard_that_only_tells_or_has_its_baseline_may_have_any_tolerance() -> None:
    few: dict[str, int | None] = {"english": 9}
    assert not guard_problems(guard_section(policy="warn"), STEPS, few, is_measured=False)
    assert not guard_problems(guard_section(interval_steps=0), STEPS, few, is_measured=False)
    assert not guard_problems(guard_section(), STEPS, few, is_measured=True)


def test_guard_that_is_off_or_has_nothing_to_measure_is_not_checked() -> None:
    settings = guard_section(domains={"none": DomainLimits()}, enabled=False)
    assert not guard_problems(settings, STEPS, {"english": 0}, is_measured=False)
    assert not guard_problems(guard_section(), STEPS, {}, is_measured=False)


def test_every_domain_is_tested_once_per_measurement() -> None:
    assert num_tests(guard_section(), 3, STEPS) == 3 * 11
    assert num_tests(guard_section(interval_steps=0), 3, STEPS) == 3
