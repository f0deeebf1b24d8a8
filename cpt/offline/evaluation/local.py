"""Records of tasks from local files: JSONL, checked line by line before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from cpt.errors import DataError
from cpt.offline.evaluation.tasks import Task

Record = dict[str, Any]

MAX_PROBLEMS = 10
"""Lines of a file that a refusal names."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_visible_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value))


def _are_answers(value: Any) -> bool:
    return _is_visible_text(value) or (isinstance(value, list) and all(map(str, value)))


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "multiple_choice": {"question": _is_text, "choices": _are_choices, "answer": _is_index},
    "exact_match": {"prompt": _is_text, "answer": _are_answers},
    "perplexity": {"text": _is_visible_text},
}
"""The fields of a record by kind of task, with what their values must be."""


def read_records(task: Task) -> tuple[list[Record], str]:
    """Return the records of a local task and a hash of all that decides their score.

    Raises:
        DataError: a line cannot be used; every such line is named.
    """
    assert task.path is not None
    records: list[Record] = []
    problems: list[str] = []
    with task.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                records.append(_read_record(line, task.kind))
            except ValueError as error:
                problems.append(f"{task.path}:{number}: {error}")
    if not records and not problems:
        problems.append(f"{task.path}: holds no record. Add some, or take task '{task.name}' out.")
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], "..."]
    if problems:
        raise DataError("\n".join(problems))
    records = records[: task.limit]
    settings = [task.kind, task.separator, task.chat, task.max_new_tokens]
    used = []
    for record in records:
        used.append({key: record[key] for key in _FIELDS[task.kind]})
    content = json.dumps([settings, used], sort_keys=True)
    return records, hashlib.sha256(content.encode()).hexdigest()


def _read_record(line: bytes, kind: str) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: the line is no record of this kind of task.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not a JSON object ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object (not an object).")
    for key, is_right in _FIELDS[kind].items():
        if not is_right(record.get(key)):
            raise ValueError(f"'{key}' is missing or wrong for kind: {kind}.")
    if kind == "multiple_choice" and not 0 <= record["answer"] < len(record["choices"]):
        raise ValueError(f"'answer' is missing or wrong for kind: {kind}.")
    return record


def local_contents(tasks: Sequence[Task]) -> dict[str, str]:
    """Return `Score.content` of the local tasks by name, before a model is loaded.

    Raises:
        DataError: a file cannot be used.
    """
    contents = {}
    for task in tasks:
        if task.kind != "harness":
            _, contents[task.name] = read_records(task)
    return contents
