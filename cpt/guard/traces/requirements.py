"""The requirements of the guard on traces, before weights are read."""

from __future__ import annotations

from collections.abc import Sequence

from cpt.config import GuardSection
from cpt.guard.traces.bounds import values_needed
from cpt.guard.traces.judge import ERROR, PARTS, value_cap
from cpt.guard.traces.sampling import AskedPrompts, asked_prompts
from cpt.guard.yardstick import FALSE_ALARM_SHARE
from data_pipeline.config.traces_config import TraceDomain
from data_pipeline.errors import ConfigError


def trace_problems(
    domains: Sequence[TraceDomain], settings: GuardSection, seq_len: int, num_tests: int
) -> list[str]:
    """Return every reason to refuse the traces of a mix.

    Args:
        domains: `guard.traces` of the mix, with absolute paths.
        settings: The run's guard section.
        seq_len: Slots of a row.
        num_tests: Domains times looks of the run.
    """
    problems = []
    for domain in domains:
        try:
            asked = asked_prompts(domain)
        except ConfigError as error:
            problems += error.problems
            continue
        problems += length_problems(asked, seq_len)
        if settings.policy == "act" and settings.interval_steps > 0:
            problems += power_problems(domain, len(asked.prompts), num_tests)
    return problems


def length_problems(asked: AskedPrompts, seq_len: int) -> list[str]:
    """Return a sentence if a trace might not fit into a row."""
    longest = max(map(len, asked.prompts))
    room = seq_len - longest + 1
    if asked.domain.max_new_tokens <= room:
        return []
    cure = "Shorten the prompts" if room < 1 else f"Set it to {room} or less, shorten the prompts"
    return [
        f"guard.traces '{asked.domain.name}': max_new_tokens is {asked.domain.max_new_tokens}, but "
        f"its longest prompt takes {longest} of the {seq_len} tokens of a row (seq_len), and a "
        f"trace is measured in one row. {cure}, or raise seq_len."
    ]


def power_problems(domain: TraceDomain, num_traces: int, num_tests: int) -> list[str]:
    """Return a sentence if so few traces can show neither that a model is kept nor that it is lost.

    Kept has to be shown of a model that uses half of the tolerance, lost of one that has used it
    twice, each in nine of ten cases.
    """
    cap = value_cap(domain.hard_limit)
    line = domain.tolerance
    false_alarm = FALSE_ALARM_SHARE / (len(PARTS) * max(1, num_tests))
    needed = max(
        values_needed(line / 2, line, cap, ERROR), values_needed(2 * line, line, cap, false_alarm)
    )
    if num_traces >= needed:
        return []
    return [
        f"guard.traces '{domain.name}': {num_traces} traces cannot show whether the divergence is "
        f"below {line:g} nats a token; it takes {needed}. Give {domain.path} as many prompts "
        "(and raise num_traces), raise tolerance, or let the guard only tell: guard.policy: warn."
    ]
