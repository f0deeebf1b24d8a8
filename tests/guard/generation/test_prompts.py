"""Which prompts a look asks, and what is refused in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.guard.generation.prompts import (
    PromptPool,
    look_of_step,
    looks_of_run,
    usable_prompts,
)
from data_pipeline.config.generation_config import GenerationDomain, read_prompts
from data_pipeline.errors import ConfigError
from data_pipeline.text.harmony import DEFAULT_DATE, START, encode_prompt
from data_pipeline.text.tokenizer import encode


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} plus 1?", "answer": n + 1} for n in range(count)]


def domain(path: Path, **changes: Any) -> GenerationDomain:
    keys = {"name": "maths", "language": "en", "path": str(path), "prompts_per_look": 4}
    return GenerationDomain(**{**keys, **changes})


def pool(path: Path, num_looks: int = 9, seed: int = 1, **changes: Any) -> PromptPool:
    of_path = domain(path, **changes)
    return PromptPool.of(of_path, usable_prompts(of_path), seed=seed, num_looks=num_looks)


def asked(of: PromptPool, number: int) -> list[str]:
    return [of.records[index].prompt for index in of.of_look(number).indices]


def test_looks_ask_fresh_prompts_until_the_pass_is_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(10))
    prompts = pool(path)
    assert [prompts.of_look(number).pass_number for number in range(6)] == [0, 0, 0, 1, 1, 2]
    assert asked(prompts, 0) == asked(prompts, 1)
    for first, second in ((1, 2), (3, 4)):
        assert len({*asked(prompts, first), *asked(prompts, second)}) == 8
    assert asked(prompts, 1) != asked(prompts, 3)


def test_prompts_follow_from_the_seed_and_their_texts_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(10))
    reordered = write(tmp_path / "b.jsonl", questions(10)[::-1])
    assert asked(pool(path), 3) == asked(pool(reordered), 3)
    assert asked(pool(path), 1) != asked(pool(path, seed=2), 1)
    assert pool(path).content_hash == pool(reordered).content_hash


def test_only_the_prompts_of_planned_looks_are_in_the_pool(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(40))
    few = pool(path, num_looks=2)
    many = pool(path, num_looks=100)
    assert (len(few.records), len(many.records)) == (8, 40)
    assert asked(few, 2) == asked(many, 2)
    assert len(pool(write(tmp_path / "b.jsonl", questions(3))).records) == 3


def test_pool_can_be_cut_and_grown_to_what_was_answered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(40))
    few = pool(path, num_looks=2)
    many = pool(path, num_looks=100)
    assert many.of_size(8).records == few.records
    assert few.of_size(40).records == many.records
    assert many.of_size(8).of_look(3).pass_number == 1


@pytest.mark.parametrize(
    "changes", [{"effort": "low"}, {"max_new_tokens": 8}, {"language": "ja"}], ids=str
)
def test_everything_that_decides_a_reply_or_its_measures_changes_the_hash(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.jsonl", questions(10))
    assert pool(path).content_hash != pool(path, **changes).content_hash
    assert pool(path).content_hash == pool(path, format_tolerance_points=3.0).content_hash
    other = write(tmp_path / "b.jsonl", [*questions(9), {"prompt": "What is 9 plus 1?"}])
    assert pool(path).content_hash != pool(other).content_hash


def test_a_prompt_is_a_harmony_conversation_where_the_assistant_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(1))
    tokens = pool(path, effort="high").encode(0)
    whole = encode_prompt("What is 0 plus 1?", developer=None, effort="high", date=DEFAULT_DATE)
    assert tokens == whole
    assert tokens[-2:] == [START, *encode("assistant").tolist()]


def test_looks_are_counted_by_their_own_interval() -> None:
    assert [look_of_step(step, 100) for step in (0, 100, 200, 250)] == [0, 1, 2, 3]
    assert look_of_step(250, 0) == 1
    assert looks_of_run(250, 100) == 3 and looks_of_run(250, 0) == 1


def test_every_line_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"prompt": "a", "answer": 1}',
        "{",
        "[]",
        '{"answer": 1}',
        '{"prompt": " "}',
        '{"prompt": "b", "answr": 1}',
        '{"prompt": "c", "answer": ""}',
        '{"prompt": "d", "answer": [true]}',
        "",
        '{"prompt": "a", "answer": 2}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    records, problems = read_prompts(path)
    assert [record.prompt for record in records] == ["a"]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{path}:{line}" for line in (2, 3, 4, 5, 6, 7, 8, 10)
    ]
    assert "that of line 1" in problems[-1]
    with pytest.raises(ConfigError, match=f"guard.generation 'maths': {path}:2"):
        pool(path)


def test_missing_and_empty_files_are_told(tmp_path: Path) -> None:
    assert "No such file" in read_prompts(tmp_path / "none.jsonl")[1][0]
    assert "holds no record" in read_prompts(write(tmp_path / "empty.jsonl", []))[1][0]


def test_answers_are_texts_numbers_or_a_list_of_them(tmp_path: Path) -> None:
    given = [{"prompt": "a"}, {"prompt": "b", "answer": 0.5}, {"prompt": "c", "answer": ["x", 2]}]
    records, problems = read_prompts(write(tmp_path / "a.jsonl", given))
    assert not problems
    assert [record.answers for record in records] == [(), ("0.5",), ("x", "2")]


@pytest.mark.parametrize(
    "line", ["[" * 30_000, '{"prompt": ' + "9" * 6000 + "}"], ids=["nested", "digits"]
)
def test_line_that_is_made_to_hurt_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    records, (problem,) = read_prompts(path)
    assert records == [] and problem.startswith(f"{path}:1: not JSON that can be read (")


def test_device_is_no_file_of_prompts() -> None:
    assert read_prompts(Path("/dev/zero")) == (
        [],
        ["/dev/zero: cannot be read: Not a regular file. Give another path."],
    )
