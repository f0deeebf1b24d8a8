"""Tasks of lm-evaluation-harness, where it is installed (`pip install gpt-oss-cpt[evaluate]`) and
finds its data.

Written for lm-eval 0.4: `simple_evaluate` of a list of task names, one call per number of examples
in the prompt.
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
    """Refuse, before a model is loaded, what the harness cannot run.

    Raises:
        ConfigError: it is not installed, or does not know a task.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return
    if importlib.util.find_spec("lm_eval") is None:
        names = ", ".join(task.name for task in wanted)
        raise ConfigError(
            f"tasks {names} need lm-evaluation-harness, which is not installed: pip install 'gpt-oss-cpt[evaluate]', "
            "or list local tasks only (kind: multiple_choice, exact_match, perplexity)."
        )
    known = _manager().all_tasks
    unknown = [task for task in wanted if task.task not in known]
    if unknown:
        raise ConfigError(
            [
                f"task '{task.name}': lm-evaluation-harness has no task '{task.task}'.{nearest(str(task.task), known)}"
                for task in unknown
            ]
        )


def score_harness(
    tasks: Sequence[Task], model: Any, model_dir: Path, batch_size: int
) -> dict[str, Score]:
    """Score the harness tasks of a list.

    Raises:
        DataError: data that could not be fetched, or a task without the metric.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    scores: dict[str, Score] = {}
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for task in wanted:
        try:
            found = simple_evaluate(
                model=language_model,
                tasks=[task.task],
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=_manager(),
            )
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # `datasets` raises whatever the hub or the builder raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"task '{task.name}' (lm-evaluation-harness '{task.task}'): {reason}."
            ) from error
        scores[task.name] = _score(task, found)
    return scores


def _score(task: Task, found: dict[str, Any]) -> Score:
    """The metric of a task in what `simple_evaluate` returned."""
    values = found["results"][task.task]
    keys = [key for key in values if task.metric in (key, key.split(",")[0])]
    if not keys:
        has = ", ".join(
            sorted({key.split(",")[0] for key in values if "," in key and "stderr" not in key})
        )
        raise DataError(
            f"task '{task.name}': '{task.task}' has no metric '{task.metric}'. It has: {has}. Set metric."
        )
    documents = sum(int(n["effective"]) for n in found["n-samples"].values())
    settings = [
        task.task,
        task.metric,
        task.num_fewshot,
        task.limit,
        found.get("versions", {}).get(task.task),
    ]
    return Score(
        kind=task.kind,
        language=task.language,
        value=100 * float(values[keys[0]]),
        documents=documents,
        content=hashlib.sha256(json.dumps([settings, documents]).encode()).hexdigest(),
    )


def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()
