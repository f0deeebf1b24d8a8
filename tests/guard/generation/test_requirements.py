"""Prompts that could not show what they are for are refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.config import GuardSection
from cpt.guard.generation.requirements import WARN_INSTEAD, generation_problems
from data_pipeline.config.generation_config import GenerationDomain
from data_pipeline.config.mix_config import GuardConfig, MixConfig


def mix_of(tmp_path: Path, num_prompts: int, num_answers: int = 0, **changes: Any) -> MixConfig:
    path = tmp_path / "prompts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_prompts):
            record: dict[str, Any] = {"prompt": f"Say {number}."}
            if number < num_answers:
                record["answer"] = number
            file.write(json.dumps(record) + "\n")
    domain = GenerationDomain(name="maths", language="en", path=str(path), **changes)
    return MixConfig(seq_len=64, seed=1, sources=(), guard=GuardConfig(generation=(domain,)))


def section(**changes: Any) -> GuardSection:
    return GuardSection(**{"interval_steps": 100, "generation_interval_steps": 200, **changes})


def test_enough_prompts_are_taken(tmp_path: Path) -> None:
    assert generation_problems(section(), mix_of(tmp_path, 320, 320)) == []


def test_too_few_prompts_are_refused_with_the_number_that_it_takes(tmp_path: Path) -> None:
    problems = generation_problems(section(), mix_of(tmp_path, 100))
    assert len(problems) == 2 and problems[1] == WARN_INSTEAD
    assert "100 prompts a look cannot show" in problems[0] and "it takes about 236" in problems[0]


def test_prompts_without_an_answer_do_not_count_for_accuracy(tmp_path: Path) -> None:
    problems = generation_problems(section(), mix_of(tmp_path, 320, 64))
    assert len(problems) == 2
    assert "60 prompts with an answer a look cannot show" in problems[0]
    assert "points of accuracy" in problems[0]


def test_fewer_prompts_do_for_a_larger_tolerance(tmp_path: Path) -> None:
    mix = mix_of(tmp_path, 40, format_tolerance_points=8.0)
    assert generation_problems(section(), mix) == []


@pytest.mark.parametrize(
    "changes",
    [{"generation_interval_steps": 0}, {"policy": "warn"}, {"enabled": False}],
    ids=["no_looks", "warn", "off"],
)
def test_few_prompts_do_where_nothing_follows_from_them(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert generation_problems(section(**changes), mix_of(tmp_path, 10)) == []


def test_damaged_files_are_refused_in_any_case(tmp_path: Path) -> None:
    mix = mix_of(tmp_path, 10)
    Path(mix.guard.generation[0].path).write_text("{}\n")
    (problem,) = generation_problems(section(generation_interval_steps=0), mix)
    assert "guard.generation 'maths'" in problem and "prompts.jsonl:1:" in problem


def test_an_interval_without_prompts_is_refused() -> None:
    mix = MixConfig(seq_len=64, seed=1, sources=())
    (problem,) = generation_problems(section(), mix)
    assert "the mix has no guard.generation" in problem
    assert generation_problems(section(generation_interval_steps=0), mix) == []


def test_the_interval_is_a_multiple_of_the_guards() -> None:
    assert list(section().check()) == []
    for interval, own in ((100, 150), (0, 100)):
        settings = section(interval_steps=interval, generation_interval_steps=own)
        ((key, problem),) = settings.check()
        assert key == "generation_interval_steps" and f"is {own}, must be a multiple" in problem
