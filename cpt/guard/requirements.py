"""The requirements of the guard on its settings and on the held-out text.

Every function is pure. `guard_problems` needs neither weights nor an open build, so that a run is
refused before anything large is read; `tolerance_problems` is applied again to the measured scores,
which say more than the number of documents.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from cpt.config import DomainLimits, GuardSection
from cpt.guard.betting import MOST_DOCUMENTS, POWER_QUANTILE
from cpt.guard.drawing import DOCUMENT_SPREAD_PERCENT, alarm_documents, fresh_per_look
from cpt.guard.paired_test import CONFIDENCE
from cpt.guard.student import student_quantile
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.store.manifest import BuildManifest

WARN_INSTEAD = "Or let the guard only tell: guard.policy: warn."
"""The other cure when tolerances are too small for the held-out text."""
MOST_TOLERANCE = 100
"""Percent: largest tolerance that a message proposes."""


def guard_problems(
    settings: GuardSection,
    total_steps: int,
    num_documents: Mapping[str, int | None],
    *,
    num_domains: int,
    is_measured: bool,
) -> list[str]:
    """Return every reason to refuse the guard that is known before weights are read.

    Args:
        settings: The run's guard section.
        total_steps: Optimizer steps of the whole run.
        num_documents: See `documents_by_domain`.
        num_domains: Domains of all yardsticks: those of text, of prompts and of own traces.
        is_measured: Whether the run directory holds a baseline already. Its tolerances were checked
            when it was measured.
    """
    if not settings.enabled or not num_documents:
        return []
    problems = domain_problems(settings, num_documents)
    if is_measured or not acts(settings):
        return problems
    tests = num_tests(settings, num_domains, total_steps)
    # equally large documents show most: what they cannot show, no documents of this number can
    best_case = {}
    for name, count in num_documents.items():
        if count:
            best_case[name] = expected_size(settings, name, count, tests, num_domains)
    too_noisy = tolerance_problems(settings, best_case, tests)
    if too_noisy:
        problems += [*too_noisy, WARN_INSTEAD]
    return problems


def documents_by_domain(mix: MixConfig, manifest: BuildManifest | None) -> dict[str, int | None]:
    """Return the number of held-out documents of each guard domain of a mix.

    Args:
        mix: The data mix.
        manifest: BuildManifest of its build; without one, every number is None.
    """
    counts: dict[str, int] = {}
    if manifest is not None:
        counts = {source.name: source.held_out_documents for source in manifest.sources}
    documents: dict[str, int | None] = {}
    for domain in mix.guard_domains():
        if counts.keys() >= set(domain.sources):
            documents[domain.name] = sum(counts[name] for name in domain.sources)
        else:
            documents[domain.name] = None
    return documents


def domain_problems(settings: GuardSection, num_documents: Mapping[str, int | None]) -> list[str]:
    """Return a sentence for each name in `guard.domains` that is unknown, and each empty domain.

    Args:
        settings: The run's guard section.
        num_documents: Held-out documents by guard domain; None where the number is not known.
    """
    problems = []
    for name in settings.domains:
        if name not in num_documents:
            problems.append(
                f"guard.domains.{name}: the mix has no such held-out domain."
                f"{nearest(name, num_documents)}"
            )
    for name, count in num_documents.items():
        if count == 0:
            problems.append(
                f"guard domain {name} holds no document. Raise held_out_share of its sources, or "
                "take the domain out of the mix."
            )
    return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSize:
    """How much text of a domain is measured."""

    num_held_out: int
    """Documents of different clusters that are held out."""
    num_panel: int
    """Documents of different clusters that every look measures."""
    effective_panel: float
    """Equally large documents that would say as much as the panel."""
    fresh_per_look: int
    """Documents that one look alone measures."""
    num_looks: int
    """Looks of the whole run."""


def expected_size(
    settings: GuardSection, name: str, num_documents: int, num_tests: int, num_domains: int
) -> SampleSize:
    """Return what is measured of a domain if its documents are equally large and not related."""
    num_panel = min(num_documents, settings.max_documents)
    left = num_documents - num_panel
    num_looks = num_tests // num_domains
    return SampleSize(
        num_held_out=num_documents,
        num_panel=num_panel,
        effective_panel=num_panel,
        fresh_per_look=fresh_per_look(settings, name, left, num_looks, num_domains),
        num_looks=num_looks,
    )


def tolerance_problems(
    settings: GuardSection, sizes: Mapping[str, SampleSize], num_tests: int
) -> list[str]:
    """Return a sentence for each domain whose documents cannot show a loss of its tolerance.

    Args:
        settings: The run's guard section.
        sizes: What is measured, by domain.
        num_tests: Domains times looks of the run.
    """
    problems = []
    for name, size in sizes.items():
        needed = needed_documents(settings, name, size, num_tests)
        if needed is None:
            continue
        describe = _too_near if needed >= MOST_DOCUMENTS else _too_few
        problems.append(describe(settings, name, size, num_tests))
    return problems


def needed_documents(
    settings: GuardSection, name: str, size: SampleSize, num_tests: int
) -> int | None:
    """Return how many documents the panel of a domain needs, or None if it has enough.

    A panel has to prove that a loss at the line, `act_at` times the tolerance, is below the
    tolerance. Without fresh documents it has to prove that a loss of the tolerance is above the
    line, too. Both with a probability of 90 %.

    Args:
        settings: The run's guard section.
        name: Name of the domain.
        size: What is measured of it.
        num_tests: Domains times looks of the run.
    """
    to_prove_kept = kept_documents(settings, name)
    per_document = size.num_panel / size.effective_panel
    needed = 0
    if size.effective_panel < to_prove_kept:
        needed = math.ceil(to_prove_kept * per_document)
    if not size.fresh_per_look:
        to_alarm = alarm_documents(settings, name, num_tests)
        if size.num_panel < to_alarm:
            needed = max(needed, to_alarm)
    return needed or None


def kept_documents(settings: GuardSection, name: str) -> int:
    """Return the least n with line + (t + z) spread / sqrt(n) <= tolerance.

    t is the quantile of Student's t of the upper bound, z the normal one of a power of 90 %. A
    number above `MOST_DOCUMENTS` counts as that.
    """
    tolerance, _ = settings.limits(name)
    margin = (1 - settings.act_at) * tolerance
    if margin <= 0:  # a line at the tolerance itself: a loss of nothing must be shown to be below
        margin = tolerance
    # the normal quantile is below that of Student's t, so this count is too small, if barely
    normal = -NormalDist().inv_cdf(1 - CONFIDENCE)
    least = ((normal + POWER_QUANTILE) * DOCUMENT_SPREAD_PERCENT / margin) ** 2
    if least >= MOST_DOCUMENTS:
        return MOST_DOCUMENTS
    count = max(3, math.ceil(least))
    while True:
        quantile = student_quantile(1 - CONFIDENCE, count - 1)
        if (quantile + POWER_QUANTILE) * DOCUMENT_SPREAD_PERCENT / math.sqrt(count) <= margin:
            return count
        count += 1


def _too_few(settings: GuardSection, name: str, size: SampleSize, num_tests: int) -> str:
    """Return the sentence for a domain that has too few documents."""
    tolerance, _ = settings.limits(name)
    needed = needed_documents(settings, name, size, num_tests)
    return (
        f"guard domain {name}: {size.num_panel} documents (as good as "
        f"{size.effective_panel:.0f} equally large ones) do not show a loss of the "
        f"tolerance, {tolerance:g} %, with a probability of 90 %. That takes about "
        f"{needed:,}; {size.num_held_out:,} are held out. Hold out more (held_out_share in "
        f"the mix), measure more (guard.max_documents), or set guard.tolerance_percent (or "
        f"guard.domains.{name}.tolerance_percent) to "
        f"{_least_tolerance(settings, name, size, num_tests)}."
    )


def _too_near(settings: GuardSection, name: str, size: SampleSize, num_tests: int) -> str:
    """Return the sentence for a domain whose line is too near to its tolerance for any number."""
    tolerance, _ = settings.limits(name)
    largest = _largest_act_at(settings, name, size, num_tests)
    if largest:
        cure = f"Set guard.act_at to {largest}"
    else:
        cure = "Lower guard.act_at and hold out more (held_out_share in the mix)"
    wider = _least_tolerance(settings, name, size, num_tests)
    if not wider.startswith("more"):
        key = f"guard.domains.{name}.tolerance_percent"
        cure += f", or guard.tolerance_percent (or {key}) to {wider}"
    return (
        f"guard domain {name}: no number of documents tells a loss of the tolerance, "
        f"{tolerance:g} %, from one at the line where acting begins, "
        f"{settings.act_at * tolerance:g} % (guard.act_at {settings.act_at:g} of it). {cure}."
    )


def _is_enough(settings: GuardSection, name: str, size: SampleSize, num_tests: int) -> bool:
    """Return whether the documents would do under other settings, which draw anew."""
    left = size.num_held_out - size.num_panel
    num_domains = num_tests // size.num_looks
    fresh = fresh_per_look(settings, name, left, size.num_looks, num_domains)
    drawn = replace(size, fresh_per_look=fresh)
    return needed_documents(settings, name, drawn, num_tests) is None


def _largest_act_at(settings: GuardSection, name: str, size: SampleSize, num_tests: int) -> str:
    """Return the largest `act_at`, in hundredths, that would do; empty if none would."""

    def is_too_large(hundredths: int) -> bool:
        lower = replace(settings, act_at=hundredths / 100)
        return not _is_enough(lower, name, size, num_tests)

    # a line further below the tolerance never needs more documents
    candidates = range(1, 100)
    place = bisect_left(candidates, True, key=is_too_large)
    return f"{candidates[place - 1] / 100:g}" if place else ""


def _least_tolerance(settings: GuardSection, name: str, size: SampleSize, num_tests: int) -> str:
    """Return the least tolerance, in tenths of a percent, that the documents would show."""

    def is_enough(tenths: int) -> bool:
        limits = DomainLimits(tolerance_percent=tenths / 10, hard_limit_percent=MOST_TOLERANCE)
        wider = replace(settings, domains={**settings.domains, name: limits})
        return _is_enough(wider, name, size, num_tests)

    # a larger tolerance never needs more documents; small ones take long to compute
    candidates = range(1, 10 * MOST_TOLERANCE)
    place = bisect_left(candidates, True, key=is_enough)
    if place == len(candidates):
        return f"more than {MOST_TOLERANCE}"
    return f"{candidates[place] / 10:g}"


def acts(settings: GuardSection) -> bool:
    """Return whether measurements have consequences beyond a warning."""
    return settings.policy == "act" and settings.interval_steps > 0


def num_tests(settings: GuardSection, num_domains: int, total_steps: int) -> int:
    """Return domains times looks of the run: how many bounds must hold together."""
    return num_domains * num_looks(settings, total_steps)


def num_looks(settings: GuardSection, total_steps: int) -> int:
    """Return how often a run is measured after step 0."""
    if not settings.interval_steps:
        return 1
    return 1 + total_steps // settings.interval_steps
