"""Tasks of lm-evaluation-harness, where it is installed and finds its data.

Written for lm-eval 0.4 (`pip install gpt-oss-cpt[evaluate]`): one call of `simple_evaluate` per
task, because the number of examples in the prompt is an argument of the call.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, DataError
from cpt.offline.evaluation.harness_results import score_of_results
from cpt.offline.evaluation.scored_model import ScoredModel
from cpt.offline.evaluation.scores import Score
from cpt.offline.evaluation.tasks import Task
from cpt.offline.plain_tokenizer import plain_tokenizer
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.console.progress import show_progress

TaskManagers = dict[Path | None, Any]
"""The harness's task managers by `Task.include_path`."""
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""The methods of the harness's models that draw a bar."""


def check_harness(tasks: Sequence[Task]) -> TaskManagers:
    """Refuse, before a model is loaded, tasks that the harness cannot run.

    Returns:
        The task managers, which take seconds to make.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return {}
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
    return managers


def harness_tokenizer(scored: ScoredModel) -> Any:
    """Return the tokenizer that the harness gets: our own, not what lies beside the weights.

    Raises:
        ConfigError: the model's tokenizer is another one than o200k_harmony.
    """
    problems = scored.tokenizer_problems()
    if problems:
        raise ConfigError(problems)
    return plain_tokenizer(scored.config().max_position_embeddings)


def score_harness(
    tasks: Sequence[Task], managers: TaskManagers, model: Any, scored: ScoredModel, batch_size: int
) -> dict[str, Score]:
    """Score those tasks of a list that are the harness's, and return the scores by name.

    Args:
        tasks: The tasks, those of other kinds included.
        managers: What `check_harness` returned.
        model: The model.
        scored: Where it comes from; its tokenizer must be o200k_harmony.
        batch_size: Batch size of the harness.

    Raises:
        ConfigError: its tokenizer is another one.
        DataError: data could not be fetched, or a task lacks its metric.
    """
    wanted = [task for task in tasks if task.kind == "harness"]
    if not wanted:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = harness_tokenizer(scored)
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    _hide_bars(language_model)
    scores: dict[str, Score] = {}
    for task in wanted:
        try:
            with _told_passes(task.name, model):
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


def _hide_bars(language_model: Any) -> None:
    """Let the harness draw no bars of its own, which say in every call how to be hidden."""
    for name in REQUESTS:
        method = getattr(language_model, name)
        setattr(language_model, name, functools.partial(method, disable_tqdm=True))


@contextmanager
def _told_passes(name: str, model: Any) -> Iterator[None]:
    """Show the forward passes of a model while a task runs; nobody knows how many there will be."""
    with show_progress(None, name, "batch", leave=False) as bar:

        def count(*_: object) -> None:
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def _task_managers(tasks: Sequence[Task]) -> TaskManagers:
    """Return a task manager for the harness's own tasks, and one for each other folder."""
    from lm_eval.tasks import TaskManager

    managers: TaskManagers = {}
    for task in tasks:
        folder = task.include_path
        if folder in managers:
            continue
        if folder is None:
            managers[folder] = TaskManager()
        else:
            managers[folder] = TaskManager(include_path=str(folder), include_defaults=False)
    return managers
