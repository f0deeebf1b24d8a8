"""Tasks of lm-evaluation-harness, where it is installed and finds its data.

Written for lm-eval 0.4 (`pip install gpt-oss-cpt[evaluate]`): one call of `simple_evaluate` per
task, because the number of examples in the prompt is an argument of the call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, DataError
from cpt.offline.evaluation.harness_results import score_of_results
from cpt.offline.evaluation.scores import Score
from cpt.offline.evaluation.tasks import Task
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
    managers = _task_managers(wanted)
    problems = []
    for task in wanted:
        known = managers[task.include_path].all_tasks
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
    managers = _task_managers(wanted)
    scores: dict[str, Score] = {}
    for task in wanted:
        try:
            found = simple_evaluate(
                model=language_model,
                tasks=[task.task],
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=managers[task.include_path],
            )
        # `datasets` passes on whatever the hub or a builder raises
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"task '{task.name}' (lm-evaluation-harness '{task.task}'): {reason}."
            ) from error
        assert task.task is not None and task.metric is not None
        scores[task.name] = score_of_results(
            task.name,
            task.task,
            task.metric,
            task.language,
            found,
            found.get("samples", {}),
            settings=[task.num_fewshot, task.limit],
        )
    return scores


def _task_managers(tasks: Sequence[Task]) -> dict[Path | None, Any]:
    """Return a task manager for each folder of own tasks; making one reads all task files."""
    from lm_eval.tasks import TaskManager

    managers: dict[Path | None, Any] = {}
    for task in tasks:
        if task.include_path not in managers:
            folder = None if task.include_path is None else str(task.include_path)
            managers[task.include_path] = TaskManager(include_path=folder)
    return managers
