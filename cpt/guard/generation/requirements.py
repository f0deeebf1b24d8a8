"""The requirements of the prompts, known before weights are read."""

from __future__ import annotations

from pathlib import Path

from cpt.config import GuardSection
from cpt.guard.generation.outcomes import MOST_PROMPTS, Measure, green_power, prompts_needed
from cpt.guard.generation.outcomes import POWER as NEEDED_POWER
from data_pipeline.config.generation_config import GenerationDomain, PromptRecord, read_prompts
from data_pipeline.config.mix_config import MixConfig

WARN_INSTEAD = (
    "Or let the guard only look at replies before step 0 and at the end: "
    "guard.generation_interval_steps: 0."
)
"""The other cure when there are too few prompts."""


def generation_problems(settings: GuardSection, mix: MixConfig) -> list[str]:
    """Return every reason to refuse the prompts of a mix.

    Too few prompts for a tolerance are a reason only if something follows from the replies.

    Args:
        settings: The run's guard section.
        mix: The data mix, its paths absolute.
    """
    domains = mix.guard.generation
    if not settings.enabled:
        return []
    if not domains:
        if settings.generation_interval_steps:
            return [
                f"guard.generation_interval_steps is {settings.generation_interval_steps}, but the "
                "mix has no guard.generation. Name files of prompts there, or set it to 0."
            ]
        return []
    problems = []
    too_few = []
    for domain in domains:
        records, unusable = read_prompts(Path(domain.path))
        for problem in unusable:
            problems.append(f"guard.generation '{domain.name}': {problem}")
        if records:
            too_few += size_problems(domain, records)
    acts = settings.policy == "act" and settings.generation_interval_steps > 0
    if too_few and acts:
        problems += [*too_few, WARN_INSTEAD]
    return problems


def size_problems(domain: GenerationDomain, records: list[PromptRecord]) -> list[str]:
    """Return a sentence for each tolerance that the prompts of a look cannot show to be kept.

    Args:
        domain: The domain's keys.
        records: All prompts of its file.
    """
    num_asked = min(domain.prompts_per_look, len(records))
    num_with_answer = sum(bool(record.answers) for record in records)
    # the prompts of a look are drawn at random, so that many of them have an answer
    num_judged = num_asked * num_with_answer // len(records)
    sizes: dict[Measure, tuple[int, float]] = {
        "format": (num_asked, domain.format_tolerance_points)
    }
    if num_with_answer:
        sizes["accuracy"] = (num_judged, domain.accuracy_tolerance_points)
    problems = []
    for measure, (number, tolerance) in sizes.items():
        if number and green_power(measure, number, tolerance) >= NEEDED_POWER:
            continue
        needed = prompts_needed(measure, tolerance)
        takes = f"about {needed:,}" if needed <= MOST_PROMPTS else f"more than {MOST_PROMPTS:,}"
        kind = "prompts" if measure == "format" else "prompts with an answer"
        problems.append(
            f"guard.generation '{domain.name}': {number} {kind} a look cannot show that a loss of "
            f"{tolerance:g} points of {measure} has not happened; it takes {takes}. Add prompts to "
            f"{domain.path} and raise prompts_per_look ({domain.prompts_per_look}), or raise "
            f"{measure}_tolerance_points."
        )
    return problems
