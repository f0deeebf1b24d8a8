"""The requirements of the guard on its settings and on the held-out text.

Every function is pure. `guard_problems` needs neither weights nor an open build, so that a run is
refused before anything large is read; `tolerance_problems` is applied again to the measured scores,
which say more than the number of documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cpt.config import GuardSection
from cpt.guard.paired_test import noise_floor_percent
from cpt.guard.score import Floats
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.store.manifest import BuildManifest

WARN_INSTEAD = "Or let the guard only tell: guard.policy: warn."
"""The other cure when tolerances are too small for the held-out text."""


def guard_problems(
    settings: GuardSection,
    total_steps: int,
    num_documents: Mapping[str, int | None],
    *,
    is_measured: bool,
) -> list[str]:
    """Return every reason to refuse the guard that is known before weights are read.

    Args:
        settings: The run's guard section.
        total_steps: Optimizer steps of the whole run.
        num_documents: See `documents_by_domain`.
        is_measured: Whether the run directory holds a baseline already. Its tolerances were checked
            when it was measured.
    """
    if not settings.enabled or not num_documents:
        return []
    problems = domain_problems(settings, num_documents)
    if is_measured or not acts(settings):
        return problems
    # equally large documents show most: what they cannot show, no documents of this number can
    best_case = {}
    for name, count in num_documents.items():
        if count:
            best_case[name] = np.ones(min(count, settings.max_documents))
    too_noisy = tolerance_problems(
        settings, best_case, num_tests(settings, len(num_documents), total_steps)
    )
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


def tolerance_problems(
    settings: GuardSection, baseline: Mapping[str, Floats], num_tests: int
) -> list[str]:
    """Return a sentence for each domain whose documents cannot show a rise of its tolerance.

    Args:
        settings: The run's guard section.
        baseline: (documents,) nats of the untouched model, by domain; only their ratios count.
        num_tests: How many bounds of the run must hold together.
    """
    problems = []
    for name, nats in baseline.items():
        tolerance, _ = settings.limits(name)
        try:
            floor = noise_floor_percent(nats, num_tests)
        except ValueError as error:
            problems.append(
                f"guard domain {name} has {error}: nothing can be told from it. Hold out more."
            )
            continue
        if floor > tolerance:
            needed = math.ceil(len(nats) * (floor / tolerance) ** 2)
            problems.append(
                f"guard domain {name}: {len(nats)} documents show changes of {floor:.1f} % and "
                f"more, the tolerance is {tolerance:g} %. Hold out about {needed:,} documents "
                "(held_out_share in the mix, guard.max_documents), or set guard.tolerance_percent "
                f"(or guard.domains.{name}.tolerance_percent) to {math.ceil(10 * floor) / 10:g}."
            )
    return problems


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
