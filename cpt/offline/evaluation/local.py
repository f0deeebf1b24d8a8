"""Tasks from local files, scored in one process without a network.

    JSONL -> records, checked -> prompts -> nats of continuations, or greedy replies
        -> 1, 0 or nats per document

The likelihood of a text is computed in pieces of the vocabulary head, so that the (tokens,
vocabulary) matrix of a whole document never exists.

Shape letters: T tokens of a text, M model size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from cpt.errors import DataError
from cpt.offline.evaluation.scores import Score
from cpt.offline.evaluation.tasks import Task
from cpt.offline.sampling import decode_tokens, generate
from cpt.training.sampling import Sampling
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, encode

Record = dict[str, Any]

HEAD_TOKENS = 256
"""Tokens whose logits exist at once."""
MAX_TOKENS = 32_768
"""Tokens of the longest text that is scored."""
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


def score_task(task: Task, model: Any) -> Score:
    """Score one local task."""
    records, content = read_records(task)
    per_document = [_score_record(task, model, record) for record in records]
    if task.kind == "perplexity":
        num_bytes = sum(len(record["text"].encode("utf-8")) for record in records)
        value = sum(per_document) / math.log(2) / num_bytes
    else:
        value = 100 * sum(per_document) / len(records)
    return Score(
        kind=task.kind,
        language=task.language,
        value=value,
        documents=len(records),
        content=content,
        per_document=tuple(per_document),
    )


def _score_record(task: Task, model: Any, record: Record) -> float:
    """Return the nats of a text, or 1 for a right answer and 0 for a wrong one."""
    if task.kind == "perplexity":
        return _nats(model, [*encode(record["text"]).tolist(), END_OF_TEXT], 1)
    if task.kind == "multiple_choice":
        return float(_choose(task, model, record) == record["answer"])
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    reply = _reply(task, model, record["prompt"])
    return float(any(reply == str(answer).strip() for answer in answers))


def _choose(task: Task, model: Any, record: Record) -> int:
    """Return the index of the likeliest choice, by nats per UTF-8 byte."""
    question = encode(record["question"]).tolist()
    nats_per_byte = []
    for choice in record["choices"]:
        whole = encode(record["question"] + task.separator + choice).tolist()
        # a token that spans question and choice counts as the choice's
        start = max(1, _common_prefix(question, whole))
        nats_per_byte.append(_nats(model, whole, start) / len(choice.encode("utf-8")))
    return min(range(len(nats_per_byte)), key=nats_per_byte.__getitem__)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their start."""
    length = 0
    for token, other in zip(first, second, strict=False):
        if token != other:
            break
        length += 1
    return length


def _reply(task: Task, model: Any, prompt: str) -> str:
    """Return the greedy reply to a prompt: the final channel, or else the first line."""
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    if not task.chat:
        text = decode_tokens(generate(model, encode(prompt).tolist(), sampling))
        before_control_token = text.split("<|", 1)[0]
        return before_control_token.strip().split("\n", 1)[0].strip()
    ids = encode_prompt(prompt, developer=None, effort="low", date=DEFAULT_DATE)
    reply = ""
    for message in parse_reply(generate(model, ids, sampling)):
        if message.channel == "final":
            reply = message.text
    return reply.strip()


@torch.no_grad()
def _nats(model: Any, tokens: Sequence[int], start: int) -> float:
    """Return the negative log-likelihood of tokens[start:], given the tokens before."""
    if len(tokens) > MAX_TOKENS:
        raise DataError(
            f"a record has {len(tokens):,} tokens, more than {MAX_TOKENS:,}. Cut it into several."
        )
    ids_1T = torch.tensor([list(tokens)], device=model.device)
    hidden_TM = model.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0, start - 1 : -1]
    labels_T = ids_1T[0, start:]
    total = 0.0
    for first in range(0, len(labels_T), HEAD_TOKENS):
        span = slice(first, first + HEAD_TOKENS)
        logits_TV = model.lm_head(hidden_TM[span]).float()
        total += float(functional.cross_entropy(logits_TV, labels_T[span], reduction="sum"))
    return total
