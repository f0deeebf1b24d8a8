"""Can probe runs be compared, and do they say anything about the planned run?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from cpt.errors import ConfigError
from cpt.guard.paired_test import effective_documents
from cpt.planning.mix_probe import Probe

MIN_PROBES = 5
"""Runs that a curve needs, of the length that has the most."""
MIN_SHARES = 4
"""Different shares of replay among them."""
MIN_SHARES_OF_OTHER_LENGTH = 3
"""Different shares of replay at every further length."""
MIN_DOCUMENTS = 30
"""Equally large documents that a domain must be worth; drawing fewer anew gives too narrow an
interval.
"""
SAME_SHARE = 0.005
"""Shares of the tokens that differ by no more than this count as one."""
SAME_REPLAY = 0.05
"""Largest difference in what replay consists of, as a share of the replay."""
SAME_SCORES = 1e-7
"""Relative difference of two sums of nats up to which two runs saw the data in the same order."""
MAX_LENGTH_RATIO = 4.0
"""How many times longer than the longest probe the planned run may be."""


def check_probes(probes: Sequence[Probe], planned_steps: int | None) -> None:
    """Refuse probes that cannot be compared, or that say nothing about the planned run.

    Args:
        probes: The runs.
        planned_steps: Length of the planned run; None if it is not given.

    Raises:
        ConfigError: the message has every reason.
    """
    problems = [
        *_problems_of_comparison(probes),
        *_problems_of_number(probes),
        *_problems_of_length(probes, planned_steps),
    ]
    if problems:
        raise ConfigError(problems)


def _problems_of_comparison(probes: Sequence[Probe]) -> list[str]:
    """Return in what the probes differ that must be the same."""
    problems = []
    first = probes[0]
    for probe in probes[1:]:
        for key, value in probe.recipe.items():
            if value != first.recipe.get(key):
                problems.append(
                    f"{probe.name}: {key} is {value}, {first.name} has "
                    f"{first.recipe.get(key)}. Probes may differ in the share of replay, the "
                    "seed of the mix and the length only."
                )
        problems += _problems_of_documents(probe, first)
        source = _changed_source(probe, first)
        if source:
            problems.append(
                f"{probe.name}: {source} makes up {100 * probe.replay_parts.get(source, 0):.0f} % "
                f"of the replay, {100 * first.replay_parts.get(source, 0):.0f} % in {first.name}. "
                "Scale all sources of replay by one factor."
            )
    for domain, score in first.scores.items():
        num_documents = effective_documents(score.before)
        if num_documents < MIN_DOCUMENTS:
            problems.append(
                f"{domain}: its {len(score.before)} held-out documents weigh as much as "
                f"{num_documents:.0f} equally large ones, at least {MIN_DOCUMENTS} are needed. "
                "Raise held_out_share or guard.max_documents."
            )
    return problems


def _problems_of_documents(probe: Probe, first: Probe) -> list[str]:
    """Return the domains whose documents or untouched weights are others."""
    problems = []
    for domain in sorted(set(probe.scores) ^ set(first.scores)):
        problems.append(f"{probe.name} and {first.name}: only one of them measured {domain}.")
    for domain in sorted(set(probe.scores) & set(first.scores)):
        if probe.scores[domain].content != first.scores[domain].content:
            problems.append(
                f"{probe.name}: other held-out text of {domain}, or another untouched model, than "
                f"{first.name}."
            )
    return problems


def _changed_source(probe: Probe, first: Probe) -> str:
    """Return a source that replay holds more or less of than in the first probe, or ''."""
    if not probe.replay_parts or not first.replay_parts:
        return ""
    for source in sorted(set(probe.replay_parts) | set(first.replay_parts)):
        difference = probe.replay_parts.get(source, 0) - first.replay_parts.get(source, 0)
        if abs(difference) > SAME_REPLAY:
            return source
    return ""


def _problems_of_number(probes: Sequence[Probe]) -> list[str]:
    """Return what is missing for a curve."""
    problems = []
    by_length = probes_by_length(probes)
    main = max(by_length.values(), key=len)
    num_shares = len(_groups_of_one_share(main))
    if len(main) < MIN_PROBES or num_shares < MIN_SHARES:
        problems.append(
            f"{len(main)} probes of {main[0].steps} steps with {num_shares} different shares of "
            f"replay: a curve takes at least {MIN_PROBES} probes with {MIN_SHARES} shares."
        )
    if not any(len(group) > 1 for group in _all_groups(by_length)):
        problems.append(
            "no share of replay was run twice: how much the order of the data changes a run is not "
            "known. Repeat one probe with another `seed` in the data-mix YAML."
        )
    for group in _all_groups(by_length):
        problems += _problems_of_copies(group)
    for steps, others in by_length.items():
        num_shares = len(_groups_of_one_share(others))
        if others is not main and num_shares < MIN_SHARES_OF_OTHER_LENGTH:
            problems.append(
                f"{num_shares} different shares of replay at {steps} steps: a further length takes "
                f"at least {MIN_SHARES_OF_OTHER_LENGTH}."
            )
    return problems


def probes_by_length(probes: Sequence[Probe]) -> dict[int, list[Probe]]:
    """Return the probes by their steps, in ascending order of replay."""
    by_length: dict[int, list[Probe]] = defaultdict(list)
    for probe in sorted(probes, key=lambda probe: probe.replay_share):
        by_length[probe.steps].append(probe)
    return dict(by_length)


def _all_groups(by_length: Mapping[int, Sequence[Probe]]) -> list[list[Probe]]:
    groups = []
    for probes in by_length.values():
        groups += _groups_of_one_share(probes)
    return groups


def _groups_of_one_share(probes: Sequence[Probe]) -> list[list[Probe]]:
    """Group probes, in ascending order of replay, that have the same share."""
    groups: list[list[Probe]] = []
    for probe in probes:
        if groups and probe.replay_share - groups[-1][0].replay_share <= SAME_SHARE:
            groups[-1].append(probe)
        else:
            groups.append([probe])
    return groups


def _problems_of_copies(group: Sequence[Probe]) -> list[str]:
    """Return runs of one share that agree too well to be two runs."""
    problems = []
    for index, probe in enumerate(group):
        for other in group[:index]:
            if _same_scores(probe, other):
                problems.append(
                    f"{probe.name} and {other.name} end with the same scores, so they saw the same "
                    "data in the same order. Repeat a share with another `seed` in the mix YAML."
                )
    return problems


def _same_scores(probe: Probe, other: Probe) -> bool:
    for domain in set(probe.scores) & set(other.scores):
        one = probe.scores[domain].after.sum()
        two = other.scores[domain].after.sum()
        if not math.isclose(one, two, rel_tol=SAME_SCORES):
            return False
    return True


def _problems_of_length(probes: Sequence[Probe], planned_steps: int | None) -> list[str]:
    """Return why the probes say nothing about runs of the planned length."""
    lengths = sorted({probe.steps for probe in probes})
    told = ", ".join(f"{length:,}" for length in lengths)
    if len(lengths) > 1 and planned_steps is None:
        return [f"the probes have {told} steps. Give the length of the planned run with --steps."]
    if planned_steps is None or lengths == [planned_steps]:
        return []
    if len(lengths) == 1:
        return [
            f"the probes have {told} steps, the planned run {planned_steps:,}: another length, "
            "another loss. Leave out --steps for the answer for runs as short as these, or add "
            f"probes of a second length with {MIN_SHARES_OF_OTHER_LENGTH} shares."
        ]
    if not lengths[0] / MAX_LENGTH_RATIO <= planned_steps <= lengths[-1] * MAX_LENGTH_RATIO:
        return [
            f"the planned run has {planned_steps:,} steps, the probes {told}: more than "
            f"{MAX_LENGTH_RATIO:g} times the longest or less than that part of the shortest is not "
            "extrapolated. Run longer probes."
        ]
    return []
