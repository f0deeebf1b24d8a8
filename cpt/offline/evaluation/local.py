"""Tasks from local files, scored in one process: no network, no other library than transformers.

    JSONL -> records, checked -> prompts -> nats of continuations, or greedy replies -> 1, 0 or nats
    per document

The likelihood of a text is computed in pieces of the vocabulary head, so that no (tokens,
vocabulary) matrix of a whole document is held.  Shape letters: T tokens of a text, M model size, V
vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cpt.errors import DataError
from cpt.offline.evaluation.tasks import Task
from cpt.offline.evaluation.verdict import Score
from cpt.offline.sampling import Sampling, generate
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, decode, encode

HEAD_TOKENS = 256
"""Tokens whose logits are held at once."""
MAX_TOKENS = 32_768
"""Tokens; the longest record that is scored."""
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "multiple_choice": {
        "question": lambda v: isinstance(v, str) and bool(v),
        "choices": lambda v: (
            isinstance(v, list) and len(v) > 1 and all(isinstance(c, str) and c for c in v)
        ),
        "answer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    },
    "exact_match": {
        "prompt": lambda v: isinstance(v, str) and bool(v),
        "answer": lambda v: (
            (isinstance(v, str) and bool(v.strip())) or (isinstance(v, list) and all(map(str, v)))
        ),
    },
    "perplexity": {"text": lambda v: isinstance(v, str) and bool(v.strip())},
}


def read_records(task: Task) -> tuple[list[dict[str, Any]], str]:
    """(records of a local task, hash of them and of what decides their score).

    Raises:
        DataError: naming every line that cannot be used.
    """
    assert task.path is not None
    records, problems = [], []
    with task.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                problems.append(f"{task.path}:{number}: not a JSON object ({error}).")
                continue
            wrong = [key for key, right in _FIELDS[task.kind].items() if not right(record.get(key))]
            if (
                task.kind == "multiple_choice"
                and not wrong
                and not 0 <= record["answer"] < len(record["choices"])
            ):
                wrong = ["answer"]
            if wrong:
                problems.append(
                    f"{task.path}:{number}: '{wrong[0]}' is missing or wrong for kind: {task.kind}."
                )
            records.append(record)
    if not records and not problems:
        problems.append(f"{task.path}: holds no record. Add some, or take task '{task.name}' out.")
    if problems:
        raise DataError("\n".join(problems[:10] + ["..."] * (len(problems) > 10)))
    records = records[: task.limit]
    used = [{key: record[key] for key in _FIELDS[task.kind]} for record in records]
    settings = [task.kind, task.separator, task.chat, task.max_new_tokens]
    return records, hashlib.sha256(
        json.dumps([settings, used], sort_keys=True).encode()
    ).hexdigest()


def score_task(task: Task, model: Any) -> Score:
    """Score one local task."""
    records, content = read_records(task)
    value: float
    if task.kind == "perplexity":
        nats = [
            _nats(model, [*encode(record["text"]).tolist(), END_OF_TEXT], 1) for record in records
        ]
        size = sum(len(record["text"].encode("utf-8")) for record in records)
        per_document, value = nats, sum(nats) / math.log(2) / size
    else:
        answer = _choose if task.kind == "multiple_choice" else _reply_is_right
        per_document = [float(answer(task, model, record)) for record in records]
        value = 100 * sum(per_document) / len(records)
    return Score(
        kind=task.kind,
        language=task.language,
        value=value,
        documents=len(records),
        content=content,
        per_document=tuple(per_document),
    )


def _choose(task: Task, model: Any, record: dict[str, Any]) -> bool:
    """Whether the right choice is the likeliest, by nats per UTF-8 byte."""
    question = encode(record["question"]).tolist()
    nats = []
    for choice in record["choices"]:
        whole = encode(record["question"] + task.separator + choice).tolist()
        # a token that spans question and choice counts as the choice's
        start = next(
            (i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b),
            len(question),
        )
        nats.append(_nats(model, whole, max(start, 1)) / len(choice.encode("utf-8")))
    return min(range(len(nats)), key=nats.__getitem__) == record["answer"]


def _reply_is_right(task: Task, model: Any, record: dict[str, Any]) -> bool:
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    if task.chat:
        prompt = encode_prompt(record["prompt"], developer=None, effort="low", date=DEFAULT_DATE)
        finals = [
            part.text
            for part in parse_reply(generate(model, prompt, sampling))
            if part.channel == "final"
        ]
        reply = finals[-1] if finals else ""
    else:
        tokens = generate(model, encode(record["prompt"]).tolist(), sampling)
        reply = decode(torch.tensor(tokens).numpy()).split("<|", 1)[0].strip().split("\n", 1)[0]
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    return reply.strip() in [str(answer).strip() for answer in answers]


@torch.no_grad()
def _nats(model: Any, tokens: Sequence[int], start: int) -> float:
    """Negative log-likelihood of tokens[start:], given those before."""
    if len(tokens) > MAX_TOKENS:
        raise DataError(
            f"a record has {len(tokens):,} tokens, more than {MAX_TOKENS:,}. Cut it into several."
        )
    ids_1T = torch.tensor([list(tokens)], device=model.device)
    hidden_TM = model.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0, start - 1 : -1]
    labels_T, total = ids_1T[0, start:], 0.0
    for first in range(0, len(labels_T), HEAD_TOKENS):
        span = slice(first, first + HEAD_TOKENS)
        logits_TV = model.lm_head(hidden_TM[span]).float()
        total += float(
            torch.nn.functional.cross_entropy(logits_TV, labels_T[span], reduction="sum")
        )
    return total


def local_contents(tasks: Sequence[Task]) -> dict[str, str]:
    """`Score.content` of the local tasks, before a model is loaded.

    Raises:
        DataError: a file cannot be used.
    """
    return {task.name: read_records(task)[1] for task in tasks if task.kind != "harness"}
