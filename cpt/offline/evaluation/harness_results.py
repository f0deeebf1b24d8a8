"""What lm-evaluation-harness found, as a score: its aggregate and its documents one by one.

Written for lm-eval 0.4.13: the same dictionary is returned by `simple_evaluate` and written to
`results_<date>.json`; the samples are returned with it, or written to `samples_<task>_<date>.jsonl`
under `--log_samples`, one line for each document and filter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cpt.errors import DataError
from cpt.offline.evaluation.scores import Score

Json = dict[str, Any]

TOLERANCE = 1e-6
"""By how much the mean over documents may differ from the harness's own score, a share."""


def score_of_results(
    name: str,
    task: str,
    metric: str,
    language: str,
    found: Json,
    samples: Mapping[str, Sequence[Json]],
    settings: Sequence[Any] = (),
    highest: float | None = None,
) -> Score:
    """Return the score of a task or group of tasks.

    Args:
        name: Name of the task here, for messages.
        task: Name of the task or group in the harness.
        metric: Its metric, as `metric` or `metric,filter`.
        language: Language of the task.
        found: Output of the harness.
        samples: Its samples by task; none if they were not kept.
        settings: All else that decides the score, for `Score.content`.
        highest: Value of the metric if all is right; None if it must be a share.

    Raises:
        DataError: the harness has no such task or metric, or its value is not between 0 and
            `highest`.
    """
    results = found["results"]
    if task not in results:
        raise DataError(f"task '{name}': the harness has no result of '{task}'.")
    key, value = _metric(name, task, metric, results[task])
    tasks = leaf_tasks(task, found.get("group_subtasks", {}))
    documents = 0
    for leaf in tasks:
        documents += int(found["n-samples"][leaf]["effective"])
    per_document, hashes = _documents(tasks, key, samples)
    scale = highest or 1.0
    value /= scale
    per_document = tuple([mark / scale for mark in per_document])
    # an aggregate that is no mean over documents, such as F1, cannot be compared one by one
    if per_document and abs(math.fsum(per_document) / len(per_document) - value) > TOLERANCE:
        per_document = ()
    _refuse_no_share(name, key, highest, (value, *per_document))
    version = found.get("versions", {}).get(task)
    content = [task, key, version, documents, hashes, *settings]
    return Score(
        kind="harness",
        language=language,
        value=100 * value,
        documents=documents,
        content=hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest(),
        per_document=per_document,
    )


def _refuse_no_share(name: str, key: str, highest: float | None, shares: Sequence[float]) -> None:
    """Refuse a metric of which a value is no share; what is not a number counts as dropped."""
    scale = highest or 1.0
    for share in shares:
        if share < 0 or share > 1:
            cure = "Choose a metric that is a share of right answers."
            if highest is not None:
                cure = "Set highest, or choose a metric of which more is better."
            raise DataError(
                f"task '{name}': '{key}' is {share * scale:g}, must be between 0 and {scale:g}. "
                f"{cure}"
            )


def leaf_tasks(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group, in order, or the task itself."""
    if not subtasks.get(task):
        return [task]
    leaves: list[str] = []
    for child in subtasks[task]:
        leaves += leaf_tasks(child, subtasks)
    return leaves


def _metric(name: str, task: str, metric: str, values: Json) -> tuple[str, float]:
    """Return the key, `metric,filter`, and the value of a metric."""
    available = set()
    for key, value in values.items():
        base = key.split(",")[0]
        if "," not in key or base.endswith("_stderr"):
            continue
        if metric in (key, base):
            return key, float(value)
        available.add(base)
    raise DataError(
        f"task '{name}': '{task}' has no metric '{metric}'. It has: "
        f"{', '.join(sorted(available))}. Set metric."
    )


def _documents(
    tasks: Sequence[str], key: str, samples: Mapping[str, Sequence[Json]]
) -> tuple[tuple[float, ...], list[str]]:
    """Return the value and the hash of each document, in order; no value if one is not a number."""
    metric, filter_name = key.split(",", 1)
    values: list[float] = []
    hashes: list[str] = []
    for task in tasks:
        rows = [row for row in samples.get(task, ()) if row.get("filter") == filter_name]
        rows.sort(key=_document_number)
        for row in rows:
            hashes.append(f"{row['doc_hash']}{row['target_hash']}")
            if isinstance(row.get(metric), bool | int | float):
                values.append(float(row[metric]))
    return (tuple(values) if len(values) == len(hashes) else ()), hashes


def _document_number(row: Json) -> int:
    return int(row["doc_id"])
