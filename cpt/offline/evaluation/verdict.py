"""Scores of tasks, their noise, and whether a model has dropped by more than it may.

Noise
    Right or wrong answers: n documents with a share p right have a standard error of 100 sqrt(p (1
    - p) / n) points. So that all right or all wrong is not taken for certainty, p is estimated with
    one more answer of each kind. Bits per byte: the two models are compared on the same documents,
    so the error is that of the paired change, 100 / sum(b) sqrt(n var(a - r b)) percent with a, b
    the nats now and before and r = sum(a) / sum(b). A limit below one standard error would be
    decided by chance: it is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt.errors import ConfigError, EvaluationFailed
from cpt.offline.evaluation.tasks import Task
from data_pipeline.store.files import write_json

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One task, one model."""

    kind: str
    """As in the task YAML."""
    language: str
    """As in the task YAML."""
    value: float
    """Percent of right answers, or bits per byte."""
    documents: int
    """Scored."""
    content: str
    """Hex sha256 of the task and its documents: only equal ones are compared."""
    per_document: tuple[float, ...] = ()
    """1 for a right answer, 0 for a wrong one; nats of a text.  Empty for the harness."""

    @property
    def counts_answers(self) -> bool:
        """Whether `value` is a share of right answers, more is better; else bits per byte, less is
        better.
        """
        return self.kind != "perplexity"

    @property
    def stderr(self) -> float | None:
        """Standard error of a share of right answers, in points."""
        if not self.counts_answers:
            return None
        right = (self.value / 100 * self.documents + 1) / (self.documents + 2)
        return 100 * math.sqrt(right * (1 - right) / self.documents)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One task against its baseline."""

    name: str
    before: float
    now: float
    drop: float
    """Points of right answers, or percent of bits per byte; positive is worse."""
    noise: float
    """Standard error of `drop`, in its unit."""
    max_drop: float
    failed: bool


def write_scores(
    path: Path, model: str, scores: Mapping[str, Score], verdicts: Sequence[Verdict]
) -> None:
    """Write a result, atomically."""
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": model}
    content["tasks"] = {name: dataclasses.asdict(score) for name, score in scores.items()}
    content["verdicts"] = [dataclasses.asdict(verdict) for verdict in verdicts]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, indent=1)


def read_scores(path: Path) -> dict[str, Score]:
    """The scores of a result.

    Raises:
        ConfigError: there is none, or it is none.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: format version {content['format_version']}, must be {FORMAT_VERSION}."
            )
        return {
            name: Score(**{**value, "per_document": tuple(value["per_document"])})
            for name, value in content["tasks"].items()
        }
    except OSError as error:
        raise ConfigError(
            f"--baseline {path}: cannot be read ({error.strerror}). Make it from the model before training: cpt "
            "evaluate --model BASE --tasks TASKS.yaml --no_baseline --out FILE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--baseline {path}: not a result of cpt evaluate ({error}).") from error


def check_baseline(
    tasks: Sequence[Task], contents: Mapping[str, str], baseline: Mapping[str, Score]
) -> None:
    """Refuse, before a model is loaded, what the baseline cannot decide.

    Args:
        tasks: To be run.
        contents: `Score.content` by task; without those that only the harness knows.
        baseline: Scores before training.

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
                f"task '{task.name}': its documents or settings are not those of the baseline. Make it again."
            )
        elif before.stderr is not None and task.max_drop < before.stderr:
            problems.append(_below_noise(task, before.stderr, before.documents, "points"))
    if problems:
        raise ConfigError(problems)


def judge(
    tasks: Sequence[Task], now: Mapping[str, Score], baseline: Mapping[str, Score]
) -> list[Verdict]:
    """Compare.

    Raises:
        ConfigError: a limit on bits per byte is below the noise of the paired change.
    """
    verdicts, problems = [], []
    for task in tasks:
        after, before = now[task.name], baseline[task.name]
        if after.content != before.content:
            problems.append(
                f"task '{task.name}': its documents are not those of the baseline. Make it again."
            )
            continue
        if after.counts_answers:
            drop, noise = before.value - after.value, _noise_of_answers(after, before)
        else:
            drop, noise = _change_of_bits(
                np.array(after.per_document), np.array(before.per_document)
            )
            if task.max_drop < noise:
                problems.append(_below_noise(task, noise, after.documents, "percent"))
        verdicts.append(
            Verdict(
                name=task.name,
                before=before.value,
                now=after.value,
                drop=drop,
                noise=noise,
                max_drop=task.max_drop,
                failed=not drop <= task.max_drop,  # a score that is no number has failed
            )
        )
    if problems:
        raise ConfigError(problems)
    return verdicts


def refuse_drops(verdicts: Sequence[Verdict]) -> None:
    """Raise EvaluationFailed if a task dropped by more than its limit."""
    failed = [
        f"task '{v.name}' dropped by {v.drop:.2f} (from {v.before:.3f} to {v.now:.3f}), max_drop is {v.max_drop:g}."
        for v in verdicts
        if v.failed
    ]
    if failed:
        raise EvaluationFailed("\n".join(failed))


def _noise_of_answers(after: Score, before: Score) -> float:
    """Standard error in points of a change in right answers; paired where the answers are known one
    by one.
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
    """(percent by which nats rose, its standard error)."""
    ratio, count = after.sum() / before.sum(), len(after)
    spread = float(np.var(after - ratio * before, ddof=1)) if count > 1 else math.inf
    return float(100 * (ratio - 1)), float(100 * math.sqrt(count * spread) / before.sum())


def _below_noise(task: Task, noise: float, documents: int, unit: str) -> str:
    needed = math.ceil(documents * (noise / task.max_drop) ** 2)
    return (
        f"task '{task.name}': max_drop {task.max_drop:g} is below the noise floor of {noise:.2f} {unit} that "
        f"{documents} documents have: chance would decide. Raise it, or give about {needed:,} documents."
    )


def table(scores: Mapping[str, Score], verdicts: Sequence[Verdict]) -> str:
    """Scores for people; before and after if there is a baseline."""
    width = max(map(len, scores), default=4)
    if not verdicts:
        lines = [f"{'task':<{width}}  language  documents      score   noise"]
        for name, s in scores.items():
            noise = f"{s.stderr:7.2f}" if s.stderr is not None else f"{'paired':>7}"
            unit = "%" if s.counts_answers else "bits per byte"
            lines.append(
                f"{name:<{width}}  {s.language:<8}  {s.documents:9,}  {s.value:9.3f} {noise}  {unit}"
            )
        return "\n".join(lines)
    lines = [
        f"{'task':<{width}}  language  documents     before        now     drop   noise  max_drop"
    ]
    for v in verdicts:
        s = scores[v.name]
        lines.append(
            f"{v.name:<{width}}  {s.language:<8}  {s.documents:9,}  {v.before:9.3f}  {v.now:9.3f}  {v.drop:+7.2f}  "
            f"{v.noise:6.2f}  {v.max_drop:8g}{'  FAILED' * v.failed}"
        )
    return "\n".join(lines)
