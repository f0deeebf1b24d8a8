"""What a result file holds: the scores of one model, and the verdicts on them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cpt.errors import ConfigError
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.store.files import atomic_write, make_folder

FORMAT_VERSION = 1

State = Literal["kept", "not_shown", "dropped", "no_limit"]
"""`kept`: the upper bound of the drop is within the limit. `dropped`: it is not, and a drop is
proven. `not_shown`: neither. `no_limit`: the task has none, and no drop is proven.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of one model on one task."""

    kind: str
    """Kind of task, as in the task YAML, or the tool that measured it."""
    language: str
    """Language of the task, as in the task YAML."""
    value: float
    """Percent of right answers (or of the highest mark), or bits per byte."""
    documents: int
    """Number of scored documents."""
    content: str
    """Hex sha256 of the task and its documents; only equal ones are compared."""
    per_document: tuple[float, ...] = ()
    """The share of each document that was right, between 0 and 1, or the nats of a text; empty if
    the documents are not known one by one.
    """

    @property
    def counts_answers(self) -> bool:
        """Whether `value` is a share of right answers (more is better) or bits per byte (less)."""
        return self.kind != "perplexity"

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """(documents,) `per_document` as an array."""
        return np.array(self.per_document, dtype=np.float64)

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether each document is known to be right (1) or wrong (0)."""
        return bool(self.per_document) and set(self.per_document) <= {0.0, 1.0}

    @property
    def stderr(self) -> float | None:
        """Standard error of a share of right answers, in points; None for bits per byte.

        One more answer of each kind is counted, so that all right or all wrong is not certainty.
        """
        if not self.counts_answers:
            return None
        if self.per_document and not self.is_right_or_wrong and self.documents > 1:
            return 100 * float(self.values.std(ddof=1)) / math.sqrt(self.documents)
        right = (self.value / 100 * self.documents + 1) / (self.documents + 2)
        return 100 * math.sqrt(right * (1 - right) / self.documents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One task against its baseline. Drops are points of right answers, or percent of the bits per
    byte; positive is worse.
    """

    name: str
    """Name of the task."""
    before: float
    """`Score.value` of the model before training."""
    now: float
    """`Score.value` of the model after training."""
    drop: float
    """Estimated drop."""
    noise: float | None
    """Standard error of `drop`; None if one document is all there is."""
    upper_bound: float | None
    """One-sided 95 % upper bound of the drop; None if there is none."""
    max_drop: float | None
    """Limit of the task; None if it has none, and only a proven drop counts."""
    state: State
    """The verdict."""
    method: str
    """How the two were compared: mcnemar, paired, ratio or unpaired."""
    lost: int | None = None
    """Answers that went from right to wrong; None where answers are not known one by one."""
    won: int | None = None
    """Answers that went from wrong to right; None like `lost`."""
    p_value: float | None = None
    """One-sided mid-p value of McNemar's test; None like `lost`."""
    level: float
    """Significance level below which a drop is proven."""
    power: float | None = None
    """Probability that a true drop of `max_drop` would be proven with these documents."""
    documents_needed: int | None = None
    """About how many documents would prove a drop of `max_drop` with a probability of 80 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A result file."""

    model: str
    """Directory or name of the model."""
    scores: Mapping[str, Score]
    """Scores by task."""
    verdicts: Sequence[Verdict] = ()
    """Verdicts against a baseline, if there was one."""
    step: int | None = None
    """Step of the checkpoint; None if it is not known."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the model was asked: sampling, reasoning effort, versions of the tools."""


def refuse_same_file(out: Path, inputs: Mapping[str, Path | None], option: str = "--out") -> None:
    """Refuse to write a result over a file that is read.

    Args:
        out: File for the result.
        inputs: Files that are read, by their options.
        option: The option of `out`, for messages.

    Raises:
        ConfigError: with the option that names the same file.
    """
    for name, path in inputs.items():
        if path is not None and out.resolve() == path.resolve():
            raise ConfigError(f"{option} {out} is the file of {name}. Choose another file.")


def write_result(path: Path, result: Result) -> None:
    """Write a result, atomically."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": result.model,
        "step": result.step,
        "settings": dict(result.settings),
        "tasks": {name: asdict(score) for name, score in result.scores.items()},
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
    }
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode("ascii") + b"\n")


def read_result(path: Path, option: str = "--baseline") -> Result:
    """Read a result.

    Args:
        path: The file.
        option: The option that named it, for messages.

    Raises:
        ConfigError: the file is missing, or is not a result of `cpt evaluate` or `cpt suite`.
    """
    try:
        content = read_json(path, LARGE_BYTES)
        if content["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: format version {content['format_version']}, must be {FORMAT_VERSION}."
            )
        scores = {}
        for name, plain in content["tasks"].items():
            scores[name] = Score(**{**plain, "per_document": tuple(plain["per_document"])})
        return Result(
            model=content["model"],
            scores=scores,
            step=content.get("step"),
            settings=content.get("settings", {}),
        )
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be read ({error.strerror}). Make it from the model before "
            "training: cpt evaluate --model BASE --tasks TASKS.yaml --no_baseline --out FILE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option} {path}: not a result of cpt evaluate ({error}).") from error
