"""A guard that could not do its work is refused from the mix and the settings alone."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.config import DomainLimits, GuardSection
from cpt.guard.paired_test import effective_documents, margin_of_error
from cpt.guard.requirements import (
    WARN_INSTEAD,
    documents_by_domain,
    domain_problems,
    expected_size,
    guard_problems,
    kept_documents,
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


def text_problems(
    settings: GuardSection, steps: int, num_documents: dict[str, int | None], *, is_measured: bool
) -> list[str]:
    """Return the problems of a run that measures nothing but text."""
    return guard_problems(
        settings, steps, num_documents, num_domains=len(num_documents), is_measured=is_measured
    )


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
    problems = text_problems(guard_section(), STEPS, {"english": 9}, is_measured=False)
    assert "guard domain english: 9 documents (as good as 9 equally large ones)" in problems[0]
    assert "9 are held out" in problems[0]
    assert problems[-1] == WARN_INSTEAD


def test_refusal_names_a_number_of_documents_and_a_tolerance_that_would_do() -> None:
    """A panel of 256 does not show 1 %; without fresh documents that takes several hundred."""
    settings = guard_section(tolerance_percent=1.0)
    (problem, _) = text_problems(settings, STEPS, {"english": 400}, is_measured=False)
    named = re.search(r"takes about ([\d,]+);.*tolerance_percent\) to ([\d.]+)\.$", problem)
    assert named
    needed = int(named[1].replace(",", ""))
    assert 400 < needed < 1000
    larger = guard_section(tolerance_percent=1.0, max_documents=needed)
    assert not text_problems(larger, STEPS, {"english": needed}, is_measured=False)
    wider = guard_section(tolerance_percent=float(named[2]))
    assert not text_problems(wider, STEPS, {"english": 400}, is_measured=False)
    slightly_wider = guard_section(tolerance_percent=float(named[2]) - 0.1)
    assert text_problems(slightly_wider, STEPS, {"english": 400}, is_measured=False)


@pytest.mark.parametrize(
    ("act_at", "tolerance"), [(1.0, 1.0), (0.998, 1.0), (0.5, 0.005), (0.5, 1e-9)]
)
def test_line_that_no_number_of_documents_tells_from_the_tolerance_is_refused_with_a_cure(
    act_at: float, tolerance: float
) -> None:
    held_out: dict[str, int | None] = {"english": 10_000}
    settings = guard_section(act_at=act_at, tolerance_percent=tolerance)
    problem, last = text_problems(settings, STEPS, held_out, is_measured=False)
    assert "english: no number of documents tells a loss of the tolerance" in problem
    assert f"(guard.act_at {act_at:g} of it)" in problem and last == WARN_INSTEAD
    lower = re.search(r"Set guard\.act_at to ([\d.]+)[.,]", problem)
    wider = re.search(r"tolerance_percent\) to ([\d.]+)\.$", problem)
    assert bool(lower) == (tolerance == 1) and bool(wider) == (act_at == 0.5)
    if lower:
        largest = float(lower[1])
        cured = guard_section(act_at=largest, tolerance_percent=tolerance)
        assert not text_problems(cured, STEPS, held_out, is_measured=False)
        above = guard_section(act_at=largest + 0.01, tolerance_percent=tolerance)
        assert text_problems(above, STEPS, held_out, is_measured=False)
    if wider:
        cured = guard_section(act_at=act_at, tolerance_percent=float(wider[1]))
        cured = dataclasses.replace(cured, hard_limit_percent=100)
        assert not text_problems(cured, STEPS, held_out, is_measured=False)


def test_few_documents_at_a_line_on_the_tolerance_are_told_to_become_more() -> None:
    settings = guard_section(act_at=1.0)
    problem, _ = text_problems(settings, STEPS, {"english": 9}, is_measured=False)
    assert problem.endswith("Lower guard.act_at and hold out more (held_out_share in the mix).")


def test_tolerance_that_is_named_counts_the_fresh_documents_that_it_would_draw() -> None:
    """At 0.1 % nothing is drawn fresh; at the tolerance that is named, the panel needs no more."""
    settings = guard_section(tolerance_percent=0.1)
    (problem, _) = text_problems(settings, STEPS, {"english": 5_000}, is_measured=False)
    named = re.search(r"tolerance_percent\) to ([\d.]+)\.$", problem)
    assert named
    wider = guard_section(tolerance_percent=float(named[1]))
    assert not text_problems(wider, STEPS, {"english": 5_000}, is_measured=False)
    less = guard_section(tolerance_percent=float(named[1]) - 0.1)
    assert text_problems(less, STEPS, {"english": 5_000}, is_measured=False)


def test_many_held_out_documents_let_a_panel_of_the_default_size_do() -> None:
    settings = guard_section(tolerance_percent=1.0)
    assert not text_problems(settings, STEPS, {"english": 10_000}, is_measured=False)


def test_noise_alone_is_not_enough() -> None:
    """100 documents show a change of 0.95 % once in two times at most: the error is 0.2 %, and the
    upper bound of a loss at the line must be below the tolerance nine times out of ten."""
    settings = guard_section(tolerance_percent=1.0)
    count = kept_documents(settings, "english")
    assert 130 <= count <= 145
    generator = np.random.default_rng(2)
    ones = np.ones(count)
    kept = 0
    for _ in range(400):
        now = 1 + (0.5 + 2 * generator.normal(size=count)) / 100
        delta = 100 * (now.mean() - 1)
        kept += delta + margin_of_error(now, ones, 0.05) < 1.0
    assert 0.86 <= kept / 400 <= 0.94


@pytest.mark.parametrize("seed", range(20))
def test_no_refusal_before_weights_is_missing_from_the_one_after_the_measurement(seed: int) -> None:
    """Real documents differ in size, so they never show more than equally large ones."""
    generator = np.random.default_rng(seed)
    settings = guard_section(tolerance_percent=float(generator.uniform(0.3, 3.0)))
    count = int(generator.integers(3, 200))
    nats = np.exp(generator.normal(7, 1, count))
    before = text_problems(settings, STEPS, {"english": count}, is_measured=False)
    tests = num_tests(settings, 1, STEPS)
    equal = expected_size(settings, "english", count, tests, 1)
    real = dataclasses.replace(equal, effective_panel=effective_documents(nats))
    after = tolerance_problems(settings, {"english": real}, tests)
    assert not before or after


def test_guard_that_only_tells_or_has_its_baseline_may_have_any_tolerance() -> None:
    few: dict[str, int | None] = {"english": 9}
    assert not text_problems(guard_section(policy="warn"), STEPS, few, is_measured=False)
    assert not text_problems(guard_section(interval_steps=0), STEPS, few, is_measured=False)
    assert not text_problems(guard_section(), STEPS, few, is_measured=True)


def test_guard_that_is_off_or_has_nothing_to_measure_is_not_checked() -> None:
    settings = guard_section(domains={"none": DomainLimits()}, enabled=False)
    assert not text_problems(settings, STEPS, {"english": 0}, is_measured=False)
    assert not text_problems(guard_section(), STEPS, {}, is_measured=False)


def test_every_domain_is_tested_once_per_measurement() -> None:
    assert num_tests(guard_section(), 3, STEPS) == 3 * 11
    assert num_tests(guard_section(interval_steps=0), 3, STEPS) == 3


def test_prompts_and_traces_share_the_false_alarms_with_text_and_so_ask_for_more_of_it() -> None:
    settings = guard_section(tolerance_percent=1.0, max_documents=2000, fresh_documents=0)

    def is_refused(count: int, num_domains: int) -> bool:
        return bool(
            guard_problems(
                settings, STEPS, {"english": count}, num_domains=num_domains, is_measured=False
            )
        )

    enough_alone = next(count for count in range(100, 2000) if not is_refused(count, 1))
    assert is_refused(enough_alone, 9)
