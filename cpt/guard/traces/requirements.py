"""The requirements of the guard on traces, before weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cpt.config import GuardSection, TrainSection
from cpt.guard.requirements import WARN_INSTEAD, acts, num_tests
from cpt.guard.traces.bounds import values_needed
from cpt.guard.traces.judge import PARTS, value_cap
from cpt.guard.traces.sampling import AskedPrompts, asked_prompts
from cpt.guard.yardstick import FALSE_ALARM_SHARE, GREEN_ERROR
from data_pipeline.config.generation_config import read_prompts
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.traces_config import TraceDomain
from data_pipeline.errors import ConfigError
from data_pipeline.store.text_files import open_text, text_layers


def trace_problems(settings: GuardSection, mix: MixConfig, train: TrainSection) -> list[str]:
    """Return every reason to refuse the traces of a mix.

    Too few traces for a tolerance are a reason only if something follows from them.

    Args:
        settings: The run's guard section.
        mix: The data mix, its paths absolute.
        train: The run's train section.
    """
    if not settings.enabled:
        return []
    problems = []
    too_few = []
    tests = num_tests(settings, len(mix.serving_sources()), train.total_steps)
    for domain in mix.guard.traces:
        try:
            asked = asked_prompts(domain)
        except ConfigError as error:
            problems += [f"guard.traces '{domain.name}': {one}" for one in error.problems]
            continue
        problems += length_problems(asked, train.seq_len)
        too_few += power_problems(domain, len(asked.prompts), tests)
    if too_few and acts(settings):
        problems += [*too_few, WARN_INSTEAD]
    if not problems:
        problems += trained_prompt_problems(mix)
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


def power_problems(domain: TraceDomain, num_traces: int, tests: int) -> list[str]:
    """Return a sentence if so few traces can show neither that a model is kept nor that it is lost.

    Kept has to be shown of a model that uses half of the tolerance, lost of one that has used it
    twice, each in nine of ten cases.
    """
    cap = value_cap(domain.hard_limit)
    line = domain.tolerance
    false_alarm = FALSE_ALARM_SHARE / (len(PARTS) * tests)
    needed = max(
        values_needed(line / 2, line, cap, GREEN_ERROR),
        values_needed(2 * line, line, cap, false_alarm),
    )
    if num_traces >= needed:
        return []
    return [
        f"guard.traces '{domain.name}': {num_traces} traces cannot show whether the divergence is "
        f"below {line:g} nats a token; it takes {needed}. Give {domain.path} as many prompts "
        "and raise num_traces, or raise tolerance."
    ]


def trained_prompt_problems(mix: MixConfig) -> list[str]:
    """Return a sentence for each source of own replies that answers a prompt of the traces.

    A model that is trained on its reply to a prompt keeps that reply, and the trace of the same
    prompt would tell nothing of all others.
    """
    asked: dict[str, str] = {}
    for domain in mix.guard.traces:
        records, _ = read_prompts(Path(domain.path))
        for record in records:
            asked[record.prompt.strip()] = domain.name
    problems = []
    for source in mix.sources:
        if source.kind != "self_replay" or not asked:
            continue
        shared = []
        for path in source.files():
            shared += [text for text in _user_texts(path) if text.strip() in asked]
        if shared:
            domain_name = asked[shared[0].strip()]
            problems.append(
                f"guard.traces '{domain_name}': source '{source.name}' trains on replies to "
                f"{len(set(shared))} of the guard's prompts, such as {shared[0][:60]!r}. What is "
                "trained on measures nothing: sample the source from other prompts (cpt replay), "
                "or give the guard others."
            )
    return problems


def _user_texts(path: Path) -> Iterator[str]:
    """Yield what the user says in the conversations of a JSONL file; other lines are passed over.

    The build, which reads the file for training, names what it cannot use.
    """
    if not path.is_file():
        return
    with open_text(path, text_layers(path)) as file:
        for line in file:
            try:
                messages = json.loads(line)["messages"]
                for message in messages:
                    if message["role"] == "user":
                        yield str(message["content"])
            except (ValueError, KeyError, TypeError):
                continue
