"""The replies of the untouched model, which every later reply is paired with.

    <run_dir>/guard/generation/untouched-NAME.json     one file per domain
    <run_dir>/guard/generation/answered-NAME.json      the replies so far, while they are made

A file is written before step 0 and never again; a run that goes on reads it. It holds the tokens of
the replies, so that a measure can be computed again, with a hash of the prompts and one of the
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError
from cpt.guard.generation.measures import FORM_MEASURES, ReplyMeasures, measure_reply
from cpt.guard.generation.prompts import PromptPool
from cpt.model.weights.checksums import is_identity
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json

Json = dict[str, Any]
FOLDER = "generation"
"""Folder of all files of this room within `<run_dir>/guard`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Untouched:
    """The replies of the untouched model to the pool of one domain."""

    language: str
    """Language asked for."""
    content_hash: str
    """Hash of the prompts; see `PromptPool`."""
    model: str
    """Name of the untouched model, for people."""
    weights: str
    """Hash of its weights, which stays the same when the files are moved."""
    prompts: list[str]
    """The prompts of the pool."""
    answers: list[list[str]]
    """Right answers of each prompt; empty if no program can tell."""
    replies: list[list[int]]
    """Tokens of each reply."""
    measures: list[ReplyMeasures]
    """Measures of each reply."""

    @classmethod
    def of(
        cls, pool: PromptPool, replies: Sequence[Sequence[int]], *, model: str, weights: str
    ) -> Untouched:
        """Return replies to the whole pool, measured."""
        answers = [list(record.answers) for record in pool.records]
        measures = []
        for reply, right in zip(replies, answers, strict=True):
            measures.append(measure_reply(reply, pool.domain.language, right))
        return cls(
            language=pool.domain.language,
            content_hash=pool.content_hash,
            model=model,
            weights=weights,
            prompts=[record.prompt for record in pool.records],
            answers=answers,
            replies=[list(reply) for reply in replies],
            measures=measures,
        )

    @classmethod
    def from_json(cls, plain: Json) -> Untouched:
        """Read the output of `to_json`."""
        return cls(**{**plain, "measures": measures_of(plain["measures"])})

    def to_json(self) -> Json:
        """Return the content of the file."""
        return {
            "language": self.language,
            "content_hash": self.content_hash,
            "model": self.model,
            "weights": self.weights,
            "prompts": self.prompts,
            "answers": self.answers,
            "replies": self.replies,
            "measures": columns_of(self.measures),
        }

    def measure(
        self, indices: Sequence[int], replies: Sequence[Sequence[int]]
    ) -> list[ReplyMeasures]:
        """Return the measures of replies to some prompts of the pool.

        Args:
            indices: Places of the prompts in the pool.
            replies: Tokens of the reply to each.
        """
        measures = []
        for index, reply in zip(indices, replies, strict=True):
            measures.append(measure_reply(reply, self.language, self.answers[index]))
        return measures

    def measured_again(self) -> Untouched:
        """Return the same replies with measures that are computed from them."""
        indices = range(len(self.replies))
        return replace(self, measures=self.measure(indices, self.replies))

    def check(self, path: Path, pool: PromptPool, model: str, weights: str) -> list[str]:
        """Return why these are not the replies that the run needs.

        Args:
            path: The file that they were read from.
            pool: The prompts of the run, as many as there are replies.
            model: Name of the model that the run starts from.
            weights: Hash of its weights.
        """
        problems = []
        if self.content_hash != pool.content_hash:
            problems.append(
                f"{path} holds replies to other prompts, or to the same with another language, "
                f"effort or max_new_tokens, than {pool.domain.path} has now. Change them back, or "
                "use a new --run_dir."
            )
        elif self.prompts != [record.prompt for record in pool.records]:
            problems.append(
                f"{path} holds replies to {len(self.prompts)} prompts that this run would not ask: "
                "train.seed draws others. Change it back, or use a new --run_dir."
            )
        if not is_identity(self.weights, weights):
            problems.append(
                f"{path} holds replies of another untouched model: {self.model}, as it was then. "
                f"This run starts from {model}, whose weights are others. Change the model back, "
                "or use a new --run_dir."
            )
        return problems


def untouched_file(guard_folder: Path, domain: str) -> Path:
    """Return the file of a domain."""
    return guard_folder / FOLDER / f"untouched-{domain}.json"


def answered_file(guard_folder: Path, domain: str) -> Path:
    """Return the file of the first replies to a domain, which is gone once all are there."""
    return guard_folder / FOLDER / f"answered-{domain}.json"


def answered_so_far(pool: PromptPool, replies: Sequence[Sequence[int]], weights: str) -> Json:
    """Return what `answered_file` holds.

    Args:
        pool: The prompts.
        replies: Replies to the first of them.
        weights: Hash of the weights of the untouched model.
    """
    prompts = [record.prompt for record in pool.records[: len(replies)]]
    return {
        "content_hash": pool.content_hash,
        "weights": weights,
        "prompts": prompts,
        "replies": [list(reply) for reply in replies],
    }


def read_answered(path: Path, pool: PromptPool, weights: str) -> list[list[int]]:
    """Return replies to the first prompts of a pool; none if the file has those of another run.

    Args:
        path: An `answered_file`.
        pool: The prompts.
        weights: Hash of the weights of the untouched model.
    """
    content = read_stored(path)
    if content is None:
        return []
    replies: list[list[int]] = content["replies"]
    stated = str(content.get("weights"))
    if not is_identity(stated, weights):
        return []
    return replies if content == answered_so_far(pool, replies, stated) else []


def read_untouched(guard_folder: Path) -> dict[str, Untouched]:
    """Return all replies of the untouched model that a run keeps, by domain."""
    found = {}
    for path in sorted((guard_folder / FOLDER).glob("untouched-*.json")):
        name = path.stem.removeprefix("untouched-")
        found[name] = Untouched.from_json(read_json(path, LARGE_BYTES, follow_links=False))
    return found


def read_stored(path: Path) -> Json | None:
    """Return the content of the file of a domain; None if there is none."""
    if not path.is_file():
        return None
    content: Json = read_json(path, LARGE_BYTES, follow_links=False)
    return content


def missing_untouched(path: Path, step: int) -> ConfigError:
    """Return the refusal of a run whose replies of the untouched model are gone."""
    return ConfigError(
        f"{path} is missing, and at step {step} the untouched model is gone. Restore the file, or "
        "go on without guard.generation in the mix."
    )


def columns_of(measures: Sequence[ReplyMeasures]) -> Json:
    """Return measures as one list per measure: a tenth of the size of one object per reply."""
    columns: Json = {}
    for name in FORM_MEASURES:
        columns[name] = [int(getattr(one, name)) for one in measures]
    columns["right"] = [None if one.right is None else int(one.right) for one in measures]
    columns["thinking_tokens"] = [one.thinking_tokens for one in measures]
    return columns


def measures_of(columns: Json) -> list[ReplyMeasures]:
    """Return the measures behind the output of `columns_of`."""
    measures = []
    for place, thinking_tokens in enumerate(columns["thinking_tokens"]):
        right = columns["right"][place]
        form = {name: bool(columns[name][place]) for name in FORM_MEASURES}
        measures.append(
            ReplyMeasures(
                **form,
                right=None if right is None else bool(right),
                thinking_tokens=thinking_tokens,
            )
        )
    return measures
