"""Traces that could show nothing, or that fit in no row, are refused before weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpt.config import GuardSection, TrainSection
from cpt.guard.requirements import WARN_INSTEAD
from cpt.guard.traces.requirements import trace_problems, trained_prompt_problems
from data_pipeline.config.mix_config import GuardConfig, MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.traces_config import TraceDomain
from tests.support.records import write_jsonl

ACTS = GuardSection(interval_steps=10)


@pytest.fixture
def domain(tmp_path: Path) -> TraceDomain:
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"What is {number} + 1?"} for number in range(200)])
    return TraceDomain(name="en-math", language="en", path=str(path), max_new_tokens=64)


def mix_of(domain: TraceDomain, *sources: SourceConfig) -> MixConfig:
    return MixConfig(seq_len=256, seed=0, sources=sources, guard=GuardConfig(traces=(domain,)))


def problems(domain: TraceDomain, settings: GuardSection = ACTS, seq_len: int = 256) -> list[str]:
    train = TrainSection(seq_len=seq_len, global_batch_size=8, total_steps=100, lr=1e-5)
    return trace_problems(settings, mix_of(domain), train)


def test_enough_prompts_that_fit_are_taken(domain: TraceDomain) -> None:
    assert problems(domain) == []


def test_too_few_traces_are_refused_with_the_number_that_it_takes(domain: TraceDomain) -> None:
    problem, cure = problems(replace(domain, num_traces=60))
    assert cure == WARN_INSTEAD
    assert "60 traces cannot show" in problem and "0.1 nats a token" in problem
    needed = int(problem.split("it takes ")[1].split(".")[0])
    assert problems(replace(domain, num_traces=needed)) == []
    assert problems(replace(domain, num_traces=needed - 1)) != []


@pytest.mark.parametrize(
    "settings", [GuardSection(interval_steps=10, policy="warn"), GuardSection(interval_steps=0)]
)
def test_few_traces_may_be_looked_at_where_nothing_follows(
    settings: GuardSection, domain: TraceDomain
) -> None:
    assert problems(replace(domain, num_traces=6), settings) == []


def test_trace_that_fits_in_no_row_is_refused_with_the_room_that_there_is(
    domain: TraceDomain,
) -> None:
    (problem,) = problems(domain, seq_len=128)
    assert "max_new_tokens is 64" in problem and "of the 128 tokens of a row" in problem
    room = int(problem.split("Set it to ")[1].split(" ")[0])
    assert problems(replace(domain, max_new_tokens=room), seq_len=128) == []
    assert problems(replace(domain, max_new_tokens=room + 1), seq_len=128) != []


def test_missing_file_is_named(domain: TraceDomain, tmp_path: Path) -> None:
    (problem,) = problems(replace(domain, path=str(tmp_path / "none.jsonl")))
    assert "none.jsonl: cannot be read" in problem


def test_prompts_whose_replies_are_trained_on_are_refused(
    domain: TraceDomain, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    source = SourceConfig(
        name="own", language="en", domain="chat", path=str(path), weight=1.0, kind="self_replay"
    )

    def conversation(question: str) -> dict[str, object]:
        answer = {"role": "assistant", "channel": "final", "content": "42"}
        return {"messages": [{"role": "user", "content": question}, answer]}

    write_jsonl(path, [conversation("Who are you?"), {"text": "What is 7 + 1?"}])
    assert trained_prompt_problems(mix_of(domain, source)) == []
    write_jsonl(path, [conversation("Who are you?"), conversation(" What is 7 + 1?")])
    (problem,) = trained_prompt_problems(mix_of(domain, source))
    assert "source 'own' trains on replies to 1 of the guard's prompts" in problem
    assert "What is 7 + 1?" in problem and "en-math" in problem
    given = replace(source, kind="given")
    assert trained_prompt_problems(mix_of(domain, given)) == []
