"""Scores of tasks from local files, by all ranks of an offline command.

    records -> texts to score, longest first, and prompts to answer -> divided over the ranks
        -> nats of texts, greedy replies: pieces that survive the process
        -> 1, 0 or nats per document

Texts are scored by one rank each, longest first, so that ranks have texts of about one length at
the same time. On CPUs in fp32 one process and many give the same numbers; on GPUs layouts may
differ by the rounding of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpt.errors import DataError
from cpt.model.weights.source import WeightSource
from cpt.offline.evaluation.local import Record, read_records
from cpt.offline.evaluation.scores import Score
from cpt.offline.evaluation.tasks import Task
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import Compute, ItemSeries, Pieces
from cpt.offline.replies import compute_replies
from cpt.offline.sampling import decode_tokens
from cpt.training.loader import NO_SOURCE, filler_row, make_micro_batch
from cpt.training.sampling import Sampling
from data_pipeline.dataset import IGNORED_LABEL, PackedRow
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, encode

MAX_TOKENS = 32_768
"""Tokens of the longest text that is scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """A text whose last tokens are scored, given those before them."""

    tokens: tuple[int, ...]
    """The whole text."""
    start: int
    """The first token that is scored, at least 1."""

    def row(self) -> PackedRow:
        """Return the text as a packed row, with labels for the scored tokens."""
        tokens = np.asarray(self.tokens, dtype=np.int64)
        labels = np.full_like(tokens, IGNORED_LABEL)
        labels[self.start - 1 : -1] = tokens[self.start :]
        return PackedRow(
            input_ids=tokens,
            labels=labels,
            position_ids=np.arange(len(tokens), dtype=np.int64),
            bounds=[0, len(tokens)],
            documents=np.zeros(1, dtype=np.int64),
        )


class _LocalTask:
    """A task, its records, and what is to be computed for them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.records, self.content = read_records(task)
        self.texts: list[ScoredText] = []
        self.prompts: list[list[int]] = []
        for record in self.records:
            if task.kind == "exact_match":
                self.prompts.append(_prompt(task, record))
            elif task.kind == "perplexity":
                tokens = (*encode(record["text"]).tolist(), END_OF_TEXT)
                self.texts.append(_scored_text(task, tokens, 1))
            else:
                self.texts += _choices(task, record)

    def score(self, nats: Sequence[float], replies: Sequence[Sequence[int]]) -> Score:
        """Return the score.

        Args:
            nats: Nats of each of `texts`.
            replies: Tokens of the reply to each of `prompts`.
        """
        task = self.task
        if task.kind == "perplexity":
            per_document = list(nats)
        elif task.kind == "multiple_choice":
            per_document = _right_choices(self.records, nats)
        else:
            per_document = []
            for record, tokens in zip(self.records, replies, strict=True):
                per_document.append(float(_is_answer(task, record, tokens)))
        if task.kind == "perplexity":
            num_bytes = sum(len(record["text"].encode("utf-8")) for record in self.records)
            value = sum(per_document) / math.log(2) / num_bytes
        else:
            value = 100 * sum(per_document) / len(self.records)
        return Score(
            kind=task.kind,
            language=task.language,
            value=value,
            documents=len(self.records),
            content=self.content,
            per_document=tuple(per_document),
        )


def _scored_text(task: Task, tokens: Sequence[int], start: int) -> ScoredText:
    if len(tokens) > MAX_TOKENS:
        raise DataError(
            f"task '{task.name}': a record has {len(tokens):,} tokens, more than {MAX_TOKENS:,}. "
            "Cut it into several."
        )
    return ScoredText(tokens=tuple(tokens), start=start)


def _choices(task: Task, record: Record) -> list[ScoredText]:
    """Return the question with each of its choices, whose tokens are scored."""
    question = encode(record["question"]).tolist()
    texts = []
    for choice in record["choices"]:
        whole = encode(record["question"] + task.separator + choice).tolist()
        # a token that spans question and choice counts as the choice's
        start = max(1, _common_prefix(question, whole))
        texts.append(_scored_text(task, whole, start))
    return texts


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their start."""
    length = 0
    for token, other in zip(first, second, strict=False):
        if token != other:
            break
        length += 1
    return length


def _right_choices(records: Sequence[Record], nats: Sequence[float]) -> list[float]:
    """Return, by record, whether the likeliest choice, by nats per UTF-8 byte, is the answer."""
    right = []
    first = 0
    for record in records:
        nats_per_byte = []
        for choice, found in zip(record["choices"], nats[first:], strict=False):
            nats_per_byte.append(found / len(choice.encode("utf-8")))
        first += len(record["choices"])
        chosen = min(range(len(nats_per_byte)), key=nats_per_byte.__getitem__)
        right.append(float(chosen == record["answer"]))
    return right


def _prompt(task: Task, record: Record) -> list[int]:
    if task.chat:
        return encode_prompt(record["prompt"], developer=None, effort="low", date=DEFAULT_DATE)
    tokens: list[int] = encode(record["prompt"]).tolist()
    return tokens


def _is_answer(task: Task, record: Record, tokens: Sequence[int]) -> bool:
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    reply = _reply(task, tokens)
    return any(reply == str(answer).strip() for answer in answers)


def _reply(task: Task, tokens: Sequence[int]) -> str:
    """Return what is compared of a reply: the final channel, or else the first line."""
    if not task.chat:
        before_control_token = decode_tokens(tokens).split("<|", 1)[0]
        return before_control_token.strip().split("\n", 1)[0].strip()
    reply = ""
    for message in parse_reply(tokens):
        if message.channel == "final":
            reply = message.text
    return reply.strip()


def score_local(
    tasks: Sequence[Task], model: OfflineModel, weights: WeightSource, pieces: Pieces
) -> dict[str, Score]:
    """Score tasks from local files; all ranks call it together and get the same scores.

    Args:
        tasks: Tasks of the local kinds.
        model: The model, whose weights are loaded if anything is left to compute.
        weights: Its weights.
        pieces: What is computed, now and at earlier starts.

    Returns:
        Scores by name of the task.

    Raises:
        ConfigError: the weights cannot be used; see `OfflineModel.load`.
        DataError: a record cannot be used, or a piece is damaged.
        RequeueRequested: a stop was asked for; what is computed stays.
    """
    local = [_LocalTask(task) for task in tasks]
    texts: list[ScoredText] = []
    for one in local:
        texts += one.texts
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index].tokens), index))
    of_texts = ItemSeries(name="texts", num_items=len(texts), unit="text")
    of_replies: list[ItemSeries] = []
    for index, one in enumerate(local):
        name = f"replies-{index}"  # names of tasks may not be names of files
        of_replies.append(ItemSeries(name=name, num_items=len(one.prompts), unit="prompt"))
    if any(pieces.missing(series) for series in [of_texts, *of_replies]):
        model.load(weights)
    pieces.compute(of_texts, _nats_of(model, [texts[index] for index in order]), list)
    for one, series in zip(local, of_replies, strict=True):
        _answer(one, model, series, pieces)
    nats = [0.0] * len(texts)
    for index, found in zip(order, pieces.read_items(of_texts), strict=True):
        nats[index] = found
    scores = {}
    first = 0
    for one, series in zip(local, of_replies, strict=True):
        own = nats[first : first + len(one.texts)]
        first += len(one.texts)
        scores[one.task.name] = one.score(own, pieces.read_items(series))
    return scores


def _nats_of(model: OfflineModel, texts: Sequence[ScoredText]) -> Compute[float]:
    def compute(index: int | None) -> float:
        row = filler_row(1) if index is None else texts[index].row()
        return float(
            model.score(make_micro_batch([row], [NO_SOURCE], model.topology)).double().sum()
        )

    return compute


def _answer(one: _LocalTask, model: OfflineModel, series: ItemSeries, pieces: Pieces) -> None:
    """Let the model answer the prompts of a task."""
    sampling = Sampling(max_new_tokens=one.task.max_new_tokens)

    compute_replies(pieces, series, model, one.prompts, sampling, range(len(one.prompts)))
