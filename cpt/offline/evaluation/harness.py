"""Tasks of lm-evaluation-harness, where it is installed and finds its data.

Written for lm-eval 0.4 (`pip install gpt-oss-cpt[evaluate]`): one call of `simple_evaluate` per
task, because the number of examples in the prompt is an argument of the call.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, DataError
from cpt.offline.evaluation.tasks import Task
from cpt.offline.evaluation.verdict import Score
from data_pipeline.config.strict_yaml import nearest


def check_harness(tasks: Sequence[Task]) -> None:
    """Refuse, before a model is loaded, tasks that the harness cannot run.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return
    if importlib.util.find_spec("lm_eval") is None:
        names = ", ".join([task.name for task in wanted])
        raise ConfigError(
            f"tasks {names} need lm-evaluation-harness, which is not installed: pip install "
            "'gpt-oss-cpt[evaluate]', or list local tasks only (kind: multiple_choice, "
            "exact_match, perplexity)."
        )
    known = _task_manager().all_tasks
    problems = []
    for task in wanted:
        if task.task not in known:
            problems.append(
                f"task '{task.name}': lm-evaluation-harness has no task '{task.task}'."
                f"{nearest(str(task.task), known)}"
            )
    if problems:
        raise ConfigError(problems)


def score_harness(
    tasks: Sequence[Task], model: Any, model_dir: Path, batch_size: int
) -> dict[str, Score]:
    """Score those tasks of a list that are the harness's, and return the scores by name.

    Raises:
        DataError: data could not be fetched, or a task lacks its metric.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    scores: dict[str, Score] = {}
    for task in wanted:
        try:
            found = simple_evaluate(
                model=language_model,
                tasks=[task.task],
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=_task_manager(),
            )
        # `datasets` passes on whatever the hub or a builder raises
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"task '{task.name}' (lm-evaluation-harness '{task.task}'): {reason}."
            ) from error
        scores[task.name] = _score(task, found)
    return scores


def _score(task: Task, found: dict[str, Any]) -> Score:
    """Return a task's score from the output of `simple_evaluate`."""
    documents = sum(int(count["effective"]) for count in found["n-samples"].values())
    version = found.get("versions", {}).get(task.task)
    settings = [task.task, task.metric, task.num_fewshot, task.limit, version]
    return Score(
        kind=task.kind,
        language=task.language,
        value=100 * _metric(task, found["results"][task.task]),
        documents=documents,
        content=hashlib.sha256(json.dumps([settings, documents]).encode()).hexdigest(),
    )


def _metric(task: Task, values: dict[str, Any]) -> float:
    """Return the value of a task's metric, whose key is `metric` or `metric,filter`."""
    available = set()
    for key, value in values.items():
        name = key.split(",")[0]
        if task.metric in (key, name):
            return float(value)
        if "," in key and "stderr" not in key:
            available.add(name)
    raise DataError(
        f"task '{task.name}': '{task.task}' has no metric '{task.metric}'. It has: "
        f"{', '.join(sorted(available))}. Set metric."
    )


def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()
