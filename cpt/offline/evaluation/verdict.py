"""Whether a model kept what it could do: verdicts on its scores against those before training.

kept
    The one-sided 95 % upper bound of the drop is at most `max_drop`. All tasks must be kept, so
    this needs no correction for their number.
dropped
    It is not, and a drop is proven: McNemar's test (or the bound of the same level, where answers
    are not known one by one) is below 1 % divided by the number of tasks. So at most 1 % of the
    evaluations of a model that lost nothing end with such a verdict.
not_shown
    Neither: more documents are needed, or the drop is close to the limit.
no_limit
    The task has no `max_drop`: it fails only by a proven drop.

A limit that so many documents would not show with a probability of 80 % is refused beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cpt.errors import ConfigError, EvaluationFailed
from cpt.offline.evaluation.scores import Score, State, Verdict
from cpt.offline.evaluation.significance import (
    ASSUMED_CHURN,
    WANTED_POWER,
    Change,
    compare_answers,
    compare_nats,
    compare_shares,
    compare_values,
    items_for_answers,
    items_for_mean,
    power_of_answers,
    power_of_mean,
)
from data_pipeline.tables import table

CONFIDENCE = 0.95
"""Confidence of the upper bound of a drop."""
FALSE_DROP_SHARE = 0.01
"""Largest share of the evaluations of an unchanged model that end with a proven drop."""


def check_baseline(
    limits: Mapping[str, float | None], contents: Mapping[str, str], baseline: Mapping[str, Score]
) -> None:
    """Refuse, before a model is loaded, tasks that the baseline cannot decide.

    Args:
        limits: `max_drop` of the tasks to run.
        contents: `Score.content` by task, without those that only a tool knows.
        baseline: Scores before training, by task.

    Raises:
        ConfigError: a task has no baseline, or one of other documents, or too few documents to
            show a drop of its limit.
    """
    level = FALSE_DROP_SHARE / max(1, len(limits))
    problems = []
    for name, max_drop in limits.items():
        before = baseline.get(name)
        if before is None:
            problems.append(
                f"task '{name}': the baseline has no score of it. Make the baseline again."
            )
        elif contents.get(name, before.content) != before.content:
            problems.append(
                f"task '{name}': its documents or settings are not those of the baseline. "
                "Make it again."
            )
        elif max_drop is not None:
            problems += _too_few_documents(name, max_drop, before, level)
    if problems:
        raise ConfigError(problems)


def _too_few_documents(name: str, max_drop: float, before: Score, level: float) -> list[str]:
    """Return a problem if a drop of `max_drop` would probably not be proven.

    What is known beforehand decides: the number of documents, and how many were right. The
    error of paired values and of bits per byte is known only afterwards.
    """
    drop = max_drop / 100
    if not before.counts_answers:
        return []
    if before.is_right_or_wrong:
        power = power_of_answers(before.documents, drop, ASSUMED_CHURN, level)
        needed = items_for_answers(drop, ASSUMED_CHURN, level)
    elif not before.per_document:
        stderr = _stderr_of_difference(before)
        power = power_of_mean(drop, stderr, level)
        needed = items_for_mean(drop, stderr, before.documents, level)
    else:
        return []
    if power >= WANTED_POWER:
        return []
    return [
        f"task '{name}': {before.documents:,} documents show a drop of max_drop {max_drop:g} with "
        f"a probability of {100 * power:.0f} %, at least {100 * WANTED_POWER:.0f} % are needed. "
        f"Raise max_drop, or give about {needed:,} documents."
    ]


def _stderr_of_difference(score: Score) -> float:
    """Return the standard error of the difference of two such shares, as a share."""
    assert score.stderr is not None
    return math.sqrt(2) * score.stderr / 100


def compare_with_baseline(
    limits: Mapping[str, float | None], now: Mapping[str, Score], baseline: Mapping[str, Score]
) -> list[Verdict]:
    """Return a verdict on each task.

    Args:
        limits: `max_drop` of the tasks.
        now: Scores after training, by task.
        baseline: Scores before training, by task.

    Raises:
        ConfigError: a task has no score, or the documents of one have changed.
    """
    level = FALSE_DROP_SHARE / max(1, len(limits))
    verdicts = []
    problems = []
    for name, max_drop in limits.items():
        if name not in now or name not in baseline:
            missing = "this result" if name not in now else "the baseline"
            problems.append(f"task '{name}': {missing} has no score of it.")
        elif now[name].content != baseline[name].content:
            problems.append(
                f"task '{name}': its documents are not those of the baseline. Make it again."
            )
        else:
            verdicts.append(_judge(name, max_drop, baseline[name], now[name], level))
    if problems:
        raise ConfigError(problems)
    return verdicts


def _judge(name: str, max_drop: float | None, before: Score, now: Score, level: float) -> Verdict:
    """Return the verdict on one task."""
    method, change = _compare(before, now, level)
    power, needed = _power(max_drop, before, change, level)
    return Verdict(
        name=name,
        before=before.value,
        now=now.value,
        drop=100 * change.drop,
        noise=_finite(100 * change.stderr),
        upper_bound=_finite(100 * change.upper_bound),
        max_drop=max_drop,
        state=_state(max_drop, change),
        method=method,
        lost=change.lost,
        won=change.won,
        p_value=change.p_value,
        level=level,
        power=power,
        documents_needed=needed,
    )


def _compare(before: Score, now: Score, level: float) -> tuple[str, Change]:
    """Return how two scores can be compared, and the change between them."""
    if not before.counts_answers:
        return "ratio", compare_nats(before.values, now.values, CONFIDENCE, level)
    if before.is_right_or_wrong and now.is_right_or_wrong:
        return "mcnemar", compare_answers(before.values, now.values, CONFIDENCE, level)
    if before.per_document and now.per_document:
        return "paired", compare_values(before.values, now.values, CONFIDENCE, level)
    documents = (before.documents, now.documents)
    shares = (before.value / 100, now.value / 100)
    return "unpaired", compare_shares(*shares, documents, CONFIDENCE, level)


def _state(max_drop: float | None, change: Change) -> State:
    """Return the verdict; a score that is not a number has dropped."""
    if not math.isfinite(change.drop):
        return "dropped"
    if max_drop is not None and 100 * change.upper_bound <= max_drop:
        return "kept"
    if change.proven:
        return "dropped"
    return "no_limit" if max_drop is None else "not_shown"


def _power(
    max_drop: float | None, before: Score, change: Change, level: float
) -> tuple[float | None, int | None]:
    """Return `Verdict.power` and `Verdict.documents_needed`, from the noise that was measured."""
    if max_drop is None or not math.isfinite(change.stderr) or change.stderr == 0:
        return None, None
    drop = max_drop / 100
    if change.lost is None or change.won is None:
        power = power_of_mean(drop, change.stderr, level)
        return power, items_for_mean(drop, change.stderr, before.documents, level)
    # what changed both ways would have changed without a drop
    churn = (2 * min(change.lost, change.won) + 2) / (before.documents + 2)
    power = power_of_answers(before.documents, drop, churn, level)
    return power, items_for_answers(drop, churn, level)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def refuse_drops(verdicts: Sequence[Verdict]) -> None:
    """Refuse a model that was not shown to have kept every task.

    Raises:
        EvaluationFailed: a drop is proven on a task; the others are named as well.
        ConfigError: no drop is proven, but not every task was shown to be kept.
    """
    dropped = [_dropped_line(verdict) for verdict in verdicts if verdict.state == "dropped"]
    not_shown = [_not_shown_line(verdict) for verdict in verdicts if verdict.state == "not_shown"]
    if dropped:
        raise EvaluationFailed("\n".join([*dropped, *not_shown]))
    if not_shown:
        raise ConfigError(not_shown)


def _dropped_line(verdict: Verdict) -> str:
    counts = ""
    if verdict.lost is not None:
        counts = f"; {verdict.lost} answers lost, {verdict.won} won, p = {verdict.p_value:.2g}"
    return (
        f"task '{verdict.name}' dropped by {verdict.drop:.2f}, perhaps by {_at_most(verdict)} "
        f"(from {verdict.before:.3f} to {verdict.now:.3f}{counts}), {_limit(verdict)}."
    )


def _at_most(verdict: Verdict) -> str:
    return "any size" if verdict.upper_bound is None else f"{verdict.upper_bound:.2f}"


def _limit(verdict: Verdict) -> str:
    return "it has no max_drop" if verdict.max_drop is None else f"max_drop is {verdict.max_drop:g}"


def _not_shown_line(verdict: Verdict) -> str:
    line = (
        f"task '{verdict.name}' is not shown to be kept: it dropped by {verdict.drop:.2f}, perhaps "
        f"by {_at_most(verdict)}, {_limit(verdict)}."
    )
    if verdict.power is not None and verdict.power < WANTED_POWER:
        line += f" Give about {verdict.documents_needed:,} documents."
    return line


def score_table(scores: Mapping[str, Score], verdicts: Sequence[Verdict]) -> str:
    """Return the scores as a table for people, with before and after if there is a baseline."""
    if not verdicts:
        rows = [_score_row(name, score) for name, score in scores.items()]
        return table(("task", "language", "documents", "score", "noise", "unit"), rows)
    header = ("task", "language", "documents", "before", "now", "drop", "at most", "max_drop")
    rows = []
    for verdict in verdicts:
        rows.append(_verdict_row(verdict, scores[verdict.name]))
    return table((*header, "lost", "won", "p", "verdict"), rows)


def _score_row(name: str, score: Score) -> tuple[str, ...]:
    noise = "paired" if score.stderr is None else f"{score.stderr:.2f}"
    unit = "%" if score.counts_answers else "bits per byte"
    return name, score.language, f"{score.documents:,}", f"{score.value:.3f}", noise, unit


def _verdict_row(verdict: Verdict, score: Score) -> tuple[str, ...]:
    at_most = "-" if verdict.upper_bound is None else f"{verdict.upper_bound:+.2f}"
    counts = ("-", "-", "-")
    if verdict.lost is not None:
        counts = (f"{verdict.lost}", f"{verdict.won}", f"{verdict.p_value:.2g}")
    return (
        verdict.name,
        score.language,
        f"{score.documents:,}",
        f"{verdict.before:.3f}",
        f"{verdict.now:.3f}",
        f"{verdict.drop:+.2f}",
        at_most,
        "-" if verdict.max_drop is None else f"{verdict.max_drop:g}",
        *counts,
        verdict.state.replace("_", " "),
    )
