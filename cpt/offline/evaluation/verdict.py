"""Scores of tasks, their noise, and verdicts: whether a model dropped by more than it may.

Noise
    Right or wrong answers: n documents with a share p right have a standard error of 100 sqrt(p (1
    - p) / n) points. p is estimated with one more answer of each kind, so that all right or all
    wrong does not count as certainty.
    Bits per byte: the two models are compared on the same documents, so the error is that of the
    paired change, 100 / sum(b) sqrt(n var(a - r b)) percent, with b and a the nats before and now
    and r = sum(a) / sum(b).
    A limit below one standard error would be decided by chance: it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.errors import ConfigError, EvaluationFailed
from cpt.offline.evaluation.tasks import Task
from data_pipeline.store.files import atomic_write

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of one model on one task."""

    kind: str
    """Kind of task, as in the task YAML."""
    language: str
    """Language of the task, as in the task YAML."""
    value: float
    """Percent of right answers, or bits per byte."""
    documents: int
    """Number of scored documents."""
    content: str
    """Hex sha256 of the task and its documents; only equal ones are compared."""
    per_document: tuple[float, ...] = ()
    """1 for a right answer and 0 for a wrong one, or the nats of a text; empty for the harness."""

    @property
    def counts_answers(self) -> bool:
        """Whether `value` is a share of right answers (more is better) or bits per byte (less)."""
        return self.kind != "perplexity"

    @property
    def stderr(self) -> float | None:
        """Standard error of a share of right answers, in points; None for bits per byte."""
        if not self.counts_answers:
            return None
        right = (self.value / 100 * self.documents + 1) / (self.documents + 2)
        return 100 * math.sqrt(right * (1 - right) / self.documents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One task against its baseline."""

    name: str
    """Name of the task."""
    before: float
    """`Score.value` of the model before training."""
    now: float
    """`Score.value` of the model after training."""
    drop: float
    """Points of right answers, or percent of bits per byte; positive is worse."""
    noise: float
    """Standard error of `drop`, in its unit."""
    max_drop: float
    """Limit of the task."""
    failed: bool
    """Whether `drop` is above the limit, or not a number."""


def write_scores(
    path: Path, model: str, scores: Mapping[str, Score], verdicts: Sequence[Verdict]
) -> None:
    """Write a result, atomically."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "tasks": {name: asdict(score) for name, score in scores.items()},
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode("ascii") + b"\n")


def read_scores(path: Path) -> dict[str, Score]:
    """Return the scores of a result, by task.

    Raises:
        ConfigError: the file is missing or is not a result of `cpt evaluate`.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: format version {content['format_version']}, must be {FORMAT_VERSION}."
            )
        scores = {}
        for name, plain in content["tasks"].items():
            scores[name] = Score(**{**plain, "per_document": tuple(plain["per_document"])})
        return scores
    except OSError as error:
        raise ConfigError(
            f"--baseline {path}: cannot be read ({error.strerror}). Make it from the model before "
            "training: cpt evaluate --model BASE --tasks TASKS.yaml --no_baseline --out FILE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--baseline {path}: not a result of cpt evaluate ({error}).") from error


def check_baseline(
    tasks: Sequence[Task], contents: Mapping[str, str], baseline: Mapping[str, Score]
) -> None:
    """Refuse, before a model is loaded, tasks that the baseline cannot decide.

    Args:
        tasks: The tasks to run.
        contents: `Score.content` by task, without those that only the harness knows.
        baseline: Scores before training, by task.

    Raises:
        ConfigError: a task has no baseline, or one of other documents, or a limit below its noise.
    """
    problems = []
    for task in tasks:
        before = baseline.get(task.name)
        if before is None:
            problems.append(
                f"task '{task.name}': the baseline has no score of it. Make the baseline again."
            )
        elif contents.get(task.name, before.content) != before.content:
            problems.append(
                f"task '{task.name}': its documents or settings are not those of the baseline. "
                "Make it again."
            )
        elif before.stderr is not None and task.max_drop < before.stderr:
            problems.append(_below_noise(task, before.stderr, before.documents, "points"))
    if problems:
        raise ConfigError(problems)


def compare_with_baseline(
    tasks: Sequence[Task], now: Mapping[str, Score], baseline: Mapping[str, Score]
) -> list[Verdict]:
    """Return a verdict on each task.

    Raises:
        ConfigError: the documents of a task have changed, or its limit on bits per byte is below
            the noise of the paired change.
    """
    verdicts = []
    problems = []
    for task in tasks:
        after = now[task.name]
        before = baseline[task.name]
        if after.content != before.content:
            problems.append(
                f"task '{task.name}': its documents are not those of the baseline. Make it again."
            )
            continue
        drop, noise = _drop_and_noise(after, before)
        if not after.counts_answers and task.max_drop < noise:
            problems.append(_below_noise(task, noise, after.documents, "percent"))
        verdicts.append(
            Verdict(
                name=task.name,
                before=before.value,
                now=after.value,
                drop=drop,
                noise=noise,
                max_drop=task.max_drop,
                failed=not drop <= task.max_drop,  # true for NaN, too
            )
        )
    if problems:
        raise ConfigError(problems)
    return verdicts


def refuse_drops(verdicts: Sequence[Verdict]) -> None:
    """Refuse a model that dropped too far.

    Raises:
        EvaluationFailed: a task dropped by more than its limit.
    """
    lines = []
    for verdict in verdicts:
        if verdict.failed:
            lines.append(
                f"task '{verdict.name}' dropped by {verdict.drop:.2f} (from {verdict.before:.3f} "
                f"to {verdict.now:.3f}), max_drop is {verdict.max_drop:g}."
            )
    if lines:
        raise EvaluationFailed("\n".join(lines))


def _drop_and_noise(after: Score, before: Score) -> tuple[float, float]:
    """Return `Verdict.drop` and `Verdict.noise`."""
    if after.counts_answers:
        return before.value - after.value, _noise_of_answers(after, before)
    return _change_of_bits(np.array(after.per_document), np.array(before.per_document))


def _noise_of_answers(after: Score, before: Score) -> float:
    """Return the standard error, in points, of a change in right answers.

    It is that of the paired change where the answers are known one by one.
    """
    if after.per_document and before.per_document:
        change = np.array(before.per_document) - np.array(after.per_document)
        count = len(change)
        # one answer lost and one gained more than seen, for the same reason as in `Score.stderr`
        spread = (float((change**2).sum()) + 2) / (count + 2) - float(change.mean()) ** 2
        return 100 * math.sqrt(max(spread, 0.0) / count)
    assert after.stderr is not None and before.stderr is not None
    return math.hypot(after.stderr, before.stderr)


def _change_of_bits(after: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Return the percent by which nats rose, and its standard error."""
    ratio = after.sum() / before.sum()
    count = len(after)
    spread = float(np.var(after - ratio * before, ddof=1)) if count > 1 else math.inf
    return float(100 * (ratio - 1)), float(100 * math.sqrt(count * spread) / before.sum())


def _below_noise(task: Task, noise: float, documents: int, unit: str) -> str:
    needed = math.ceil(documents * (noise / task.max_drop) ** 2)
    return (
        f"task '{task.name}': max_drop {task.max_drop:g} is below the noise floor of {noise:.2f} "
        f"{unit} that {documents} documents have: chance would decide. Raise it, or give about "
        f"{needed:,} documents."
    )


def score_table(scores: Mapping[str, Score], verdicts: Sequence[Verdict]) -> str:
    """Return the scores as a table for people, with before and after if there is a baseline."""
    width = max(map(len, scores), default=4)
    lines = []
    if verdicts:
        lines.append(
            f"{'task':<{width}}  language  documents     before        now     drop   noise  "
            "max_drop"
        )
        for verdict in verdicts:
            lines.append(_verdict_line(verdict, scores[verdict.name], width))
    else:
        lines.append(f"{'task':<{width}}  language  documents      score   noise")
        for name, score in scores.items():
            lines.append(_score_line(name, score, width))
    return "\n".join(lines)


def _score_line(name: str, score: Score, width: int) -> str:
    noise = "paired" if score.stderr is None else f"{score.stderr:.2f}"
    unit = "%" if score.counts_answers else "bits per byte"
    return (
        f"{name:<{width}}  {score.language:<8}  {score.documents:9,}  {score.value:9.3f} "
        f"{noise:>7}  {unit}"
    )


def _verdict_line(verdict: Verdict, score: Score, width: int) -> str:
    line = (
        f"{verdict.name:<{width}}  {score.language:<8}  {score.documents:9,}  "
        f"{verdict.before:9.3f}  {verdict.now:9.3f}  {verdict.drop:+7.2f}  "
        f"{verdict.noise:6.2f}  {verdict.max_drop:8g}"
    )
    return line + "  FAILED" if verdict.failed else line
