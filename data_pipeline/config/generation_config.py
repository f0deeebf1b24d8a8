"""Prompts that the guard has the model answer: their keys, and the records of their files.

    guard.generation of the data mix -> GenerationDomain -> JSONL file -> PromptRecord

Decisions
    A record holds a `prompt`, and an `answer` if a program can tell whether a reply is right.
    The files are small and are read whole. Every line that cannot be used is named, and none is
    passed over: a check that lost half of its prompts would look the same as one that did not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from data_pipeline.bounded.files import MalformedInput, read_small_file
from data_pipeline.bounded.json_text import parse_json
from data_pipeline.config.source_config import check_language, check_name

MAX_PROBLEMS = 10
"""Lines of a file that a refusal names."""
MAX_PROMPT_FILE_BYTES = 64 * 2**20
"""Size of the largest file of prompts that is read."""
MAX_PROMPT_CHARACTERS = 100_000
"""Characters of the longest prompt; a longer one is a mistake in the file."""
IGNORED_RECORD_KEYS = frozenset(("category", "id", "license", "source", "url"))
"""Keys that name or sort a record, and change nothing of what is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDomain:
    """Prompts that the model answers during the run, against the untouched model's replies."""

    name: str
    """Unique name of the domain in metrics, other than those of `guard.domains`."""
    language: str
    """Language of the prompts and of the answers that are expected: an ISO 639-1 code; code, math,
    parallel or mixed ask for no language."""
    path: str
    """JSONL file, relative to the YAML file: one `{"prompt", "answer"}` a line. `answer` is a text,
    a number or a list of them, and may be left out."""
    sources: tuple[str, ...] = ()
    """Sources of the mix whose replay helps this domain, also those of weight 0; without them, the
    learning rate, the pause and the rollback remain."""
    effort: Literal["low", "medium", "high"] = "medium"
    """Reasoning effort that the system message names."""
    max_new_tokens: int = 1024
    """Tokens of a reply; a reply that has not ended by then counts as one that does not end."""
    prompts_per_look: int = 300
    """Prompts that are answered at each measurement, fresh ones as long as the file has some."""
    format_tolerance_points: float = 2.0
    """Tolerated share of replies, in percentage points, that the untouched model wrote in good form
    and the model no longer does."""
    accuracy_tolerance_points: float = 5.0
    """Tolerated fall of the share of right answers, in percentage points."""
    hard_limit_points: float = 15.0
    """Loss in percentage points, of either kind, that pauses the run if it stays."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one domain."""
        yield from check_name(self.name)
        yield from check_language(self.language)
        for key in ("max_new_tokens", "prompts_per_look"):
            value = getattr(self, key)
            if value < 1:
                yield key, f"is {value}, must be at least 1."
        for key in ("format_tolerance_points", "accuracy_tolerance_points"):
            value = getattr(self, key)
            if not 0 < value <= self.hard_limit_points:
                yield (
                    key,
                    f"is {value:g}, must be above 0 and at most hard_limit_points "
                    f"({self.hard_limit_points:g}).",
                )
        if not self.hard_limit_points <= 100:
            yield (
                "hard_limit_points",
                f"is {self.hard_limit_points:g}, must be at most 100 (percentage points).",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One prompt of a file."""

    prompt: str
    """What the user asks."""
    answers: tuple[str, ...] = ()
    """Answers that are right; empty if no program can tell."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Read the output of `to_json`."""
        return cls(prompt=plain["prompt"], answers=tuple(plain["answers"]))

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"prompt": self.prompt, "answers": list(self.answers)}


def read_prompts(path: Path) -> tuple[list[PromptRecord], list[str]]:
    """Read a file of prompts.

    Returns:
        The records in order, and a sentence for each line that cannot be used.
    """
    try:
        content = read_small_file(path, MAX_PROMPT_FILE_BYTES)
    except OSError as error:
        return [], [f"{path}: cannot be read: {error.strerror}. Give another path."]
    except MalformedInput as error:
        return [], [f"{error.of(path)} Split it, or give fewer prompts."]
    records: list[PromptRecord] = []
    problems: list[str] = []
    first_lines: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = _read_record(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if record.prompt in first_lines:
            problems.append(
                f"{path}:{number}: the prompt is that of line {first_lines[record.prompt]}. A "
                "prompt that is asked twice counts twice: remove one."
            )
            continue
        first_lines[record.prompt] = number
        records.append(record)
    if not records and not problems:
        problems.append(f"{path}: holds no record. Add some, or remove the domain.")
    if len(problems) > MAX_PROBLEMS:
        left = len(problems) - MAX_PROBLEMS
        problems = [*problems[:MAX_PROBLEMS], f"{path}: and {left} more lines."]
    return records, problems


def _read_record(line: bytes) -> PromptRecord:
    """Return the record of a line.

    Raises:
        ValueError: the line is no record.
    """
    try:
        record = parse_json(line)
    except MalformedInput as error:
        raise ValueError(f"not JSON that can be read ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError('not an object. Write {"prompt": "...", "answer": "..."}.')
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("'prompt' is missing, empty or no text.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"'prompt' has {len(prompt):,} characters, at most {MAX_PROMPT_CHARACTERS:,} are read."
        )
    if _has_lone_surrogate(prompt):
        raise ValueError("'prompt' holds half of a character (a lone surrogate).")
    for key in record:
        if key not in ("prompt", "answer", *IGNORED_RECORD_KEYS):
            raise ValueError(
                f"{key!r:.60} is not a known key. Known are prompt and answer; "
                f"{', '.join(sorted(IGNORED_RECORD_KEYS))} are not read."
            )
    return PromptRecord(prompt=prompt, answers=_answers_of(record))


def _answers_of(record: dict[str, Any]) -> tuple[str, ...]:
    if "answer" not in record:
        return ()
    given = record["answer"]
    listed = given if isinstance(given, list) else [given]
    answers = []
    for answer in listed:
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if not is_number and not isinstance(answer, str):
            raise ValueError("'answer' must be a text, a number, or a list of them.")
        answers.append(str(answer))
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError("'answer' is empty. Give the right answer, or leave the key out.")
    return tuple(answers)


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
